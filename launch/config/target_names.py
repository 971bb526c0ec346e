"""The names that classes had in `_target_`s before everything was below `regrow.`, and the names they have."""

from collections.abc import Collection

__all__ = ["canonical_target", "first_target"]

# Version 0.1.0's spelling -> today's. Run names are hashes over the former, stored configs hold it.
_TODAY = {
    "models.llama3.model.Llama3": "regrow.models.llama3.model.Llama3",
    "models.qwen3.model.Qwen3": "regrow.models.qwen3.model.Qwen3",
    "models.qwen3.model.Qwen3Moe": "regrow.models.qwen3.model.Qwen3Moe",
    "models.hf.from_folder": "regrow.models.hf.from_folder",
    "trainer.optimizer.AdamW": "regrow.trainer.optimizer.AdamW",
    "trainer.schedules.shapes.WarmupStableDecay": "regrow.trainer.schedules.shapes.WarmupStableDecay",
    "trainer.schedules.shapes.Cosine": "regrow.trainer.schedules.shapes.Cosine",
    "trainer.schedules.shapes.Linear": "regrow.trainer.schedules.shapes.Linear",
    "trainer.data.stdlib.StdlibSource": "regrow.trainer.data.stdlib.StdlibSource",
    "trainer.data.text.TextSource": "regrow.trainer.data.text.TextSource",
    "trainer.data.token_store.TokensSource": "regrow.trainer.data.token_store.TokensSource",
    "trainer.hooks.validation.ValidationHook": "regrow.trainer.hooks.validation.ValidationHook",
    "trainer.hooks.sample.SampleHook": "regrow.trainer.hooks.sample.SampleHook",
    "trainer.hooks.garbage.GarbageHook": "regrow.trainer.hooks.garbage.GarbageCollectionHook",
    "trainer.hooks.plot.PlotHook": "regrow.trainer.hooks.plot.PlotHook",
    "checkpoint.policy.EveryMinutes": "regrow.checkpoint.policy.save.EveryMinutes",
    "checkpoint.policy.OnBest": "regrow.checkpoint.policy.save.OnBest",
    "checkpoint.retention.KeepEveryN": "regrow.checkpoint.policy.retention.KeepEveryN",
    "checkpoint.retention.KeepBest": "regrow.checkpoint.policy.retention.KeepBest",
}
_FIRST = {today: first for first, today in _TODAY.items()}


def canonical_target(target: str, packages: Collection[str] = ()) -> str:
    """Today's name of the class.

    Args:
        target: as a command, a YAML or a stored config names it.
        packages: the user's own, whose names mean themselves even where ours were the same.
    """
    own = any(target.startswith(f"{package}.") for package in packages)
    return target if own else _TODAY.get(target, target)


def first_target(target: str) -> str:
    """The name that a class had first, which is the one that hashes are made of."""
    return _FIRST.get(target, target)
