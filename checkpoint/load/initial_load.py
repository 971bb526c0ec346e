"""Starting from weights that lie elsewhere: any source, into parameters of any layout, whole or in part."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from regrow.checkpoint.config import CheckpointConfig
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.layout import chunk_of, local_tensor
from regrow.checkpoint.format.manifest import MANIFEST
from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource, segments, whole
from regrow.checkpoint.load.locate import resolve_foreign
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.opening import as_storage
from regrow.errors import ConfigError

__all__ = [
    "LoadPlan",
    "LoadRules",
    "RenamedSource",
    "check_load",
    "check_moments",
    "check_types",
    "load_from",
    "moments_of",
    "pin_source",
    "plan_load",
    "same_tensor",
    "stored_step",
    "weights_of",
]

_PIECE_BYTES = 32 << 20
# What lies beside the weights.
_NOT_WEIGHTS = re.compile(r"^(optimizer|train_state|lr_scheduler|dataloader|data_loader)(\.|$)")
# As a shell wants it: single quotes keep it from the shell, double quotes make it a string of Hydra's.
_RULE_EXAMPLE = r"""'checkpoint.load_rename=["^model\.=>"]'"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRules:
    """How names and shapes may differ.

    Attributes:
        strict: every tensor must be found, and every stored weight used.
        rename: (pattern, replacement) pairs, applied in order to the stored names (`re.sub`).
        vocabulary: names of the tensors whose rows are tokens, whose number may differ.
        resized: load the rows of such a tensor that both have where their number differs.
    """

    strict: bool = True
    rename: tuple[tuple[str, str], ...] = ()
    vocabulary: tuple[str, ...] = ()
    resized: bool = False

    @classmethod
    def from_config(cls, config: CheckpointConfig, vocabulary: Sequence[str]) -> "LoadRules":
        """Reads `load_strict`, `load_rename` and `load_resized`.

        Args:
            config: the section.
            vocabulary: names of the tensors whose rows are tokens.

        Raises:
            ConfigError: a rule that cannot be read.
        """
        pairs = []
        for rule in config.load_rename:
            pattern, arrow, replacement = rule.partition("=>")
            try:
                re.compile(pattern)
                re.sub(pattern, replacement.strip(), "")
            except re.error as error:
                raise ConfigError(
                    f"checkpoint.load_rename must hold rules PATTERN=>REPLACEMENT, but {rule!r} is no regular "
                    f"expression ({error}); write for instance {_RULE_EXAMPLE}"
                ) from error
            if not arrow or not pattern.strip():
                raise ConfigError(
                    f"checkpoint.load_rename must hold rules PATTERN=>REPLACEMENT, but holds {rule!r}; "
                    f"write for instance {_RULE_EXAMPLE}"
                )
            pairs.append((pattern.strip(), replacement.strip()))
        return cls(
            strict=config.load_strict,
            rename=tuple(pairs),
            vocabulary=tuple(vocabulary),
            resized=config.load_resized,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """What a load does.

    Attributes:
        found: names that are loaded.
        missing: names of the model that the checkpoint does not have.
        unused: weights of the checkpoint that the model does not have.
        resized: names of which a part of the rows is loaded.
        idle_rules: rules of `load_rename` that changed no name.
    """

    found: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    resized: tuple[str, ...]
    idle_rules: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What was left out, a line each, for the log."""
        words = {
            "missing, keep their initial values": self.missing,
            "not used": self.unused,
            "rows that both have": self.resized,
        }
        lines = [f"{len(names)} tensors {what}: {', '.join(names)}" for what, names in words.items() if names]
        return [*lines, *(f"the rule {rule} of checkpoint.load_rename matches no name" for rule in self.idle_rules)]


@final
class RenamedSource(TensorSource):
    """A source under other names.

    Args:
        source: the tensors.
        rules: (pattern, replacement) pairs.
        then: applied to the names that the rules give.

    Attributes:
        idle_rules: those that changed no name.

    Raises:
        CheckpointError: two tensors would get one name.
    """

    def __init__(
        self,
        source: TensorSource,
        rules: Sequence[tuple[str, str]],
        then: Callable[[str], str] = lambda name: name,
    ) -> None:
        self.place = source.place
        self._source = source
        self._names: dict[str, str] = {}
        idle = {f"{pattern}=>{replacement}" for pattern, replacement in rules}
        for stored in source.infos:
            name = stored
            for pattern, replacement in rules:
                name, changes = re.subn(pattern, replacement, name)
                if changes:
                    idle.discard(f"{pattern}=>{replacement}")
            name = then(name)
            if name in self._names:
                raise CheckpointError(
                    f"checkpoint.load_rename must keep names apart, but {stored} and {self._names[name]} both become "
                    f"{name}; narrow the pattern"
                    if rules
                    else f"{source.place} must hold each tensor once, but {stored} and {self._names[name]} are both "
                    f"{name}; remove one of them"
                )
            self._names[name] = stored
        self.idle_rules = tuple(sorted(idle))
        self.infos: Mapping[str, TensorInfo] = {n: source.infos[stored] for n, stored in self._names.items()}

    def read(self, name: str, box: Box) -> Tensor:
        return self._source.read(self._names[name], box)

    def close(self) -> None:
        self._source.close()


def weights_of(source: TensorSource) -> list[str]:
    """The names that are a model's, not an optimizer's or a counter."""
    return [name for name in source.infos if not _NOT_WEIGHTS.search(name)]


def pin_source(location: Storage | Path | str) -> Storage:
    """What a path is at this moment: the newest step of a run that may still be saving, anything else itself.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    storage = as_storage(location)
    names = storage.names()
    # As `open_source` decides it.
    if not names or (MANIFEST not in names and any(n.endswith(".safetensors") for n in names)):
        return storage
    return resolve_foreign(storage)


def same_tensor(source: TensorSource, a: str, b: str) -> bool:
    """Whether two stored tensors hold the same values; reads no more than up to the first difference."""
    left, right = source.infos[a], source.infos[b]
    if left.shape != right.shape:
        return False
    wide = torch.promote_types(left.dtype, right.dtype)
    itemsize = max(left.dtype.itemsize, right.dtype.itemsize)
    return all(
        torch.equal(source.read(a, box).to(wide), source.read(b, box).to(wide))
        for box in segments(whole(left.shape), itemsize, _PIECE_BYTES)
    )


def plan_load(
    source: TensorSource,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    unused: Sequence[str] = (),
    beside: Collection[str] = (),
    idle_rules: Sequence[str] = (),
) -> LoadPlan:
    """What loading a whole model would do; reads no tensor.

    Args:
        source: under our names.
        shapes: of all of the model's parameters.
        unused: further names that nothing takes.
        beside: names that may lie there too: buffers, and copies of other tensors.
        idle_rules: rules of `load_rename` that changed no name.

    Raises:
        CheckpointError: a tensor holds something other than floating-point numbers.
    """
    found = [n for n in shapes if n in source.infos]
    check_types(source, found)
    return LoadPlan(
        found=tuple(found),
        missing=tuple(n for n in shapes if n not in source.infos),
        unused=tuple(n for n in [*weights_of(source), *unused] if n not in shapes and n not in beside),
        resized=tuple(n for n in found if source.infos[n].shape != shapes[n]),
        idle_rules=tuple(idle_rules),
    )


_WEIGHT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_types(source: TensorSource, names: Iterable[str]) -> None:
    """Whether these tensors are weights, and not codes for some.

    Raises:
        CheckpointError: one is not.
    """
    for name in names:
        dtype = source.infos[name].dtype
        if dtype not in _WEIGHT_TYPES:
            raise CheckpointError(
                f"{name} in {source.place} must be float32, bfloat16, float16 or float64, but is "
                f"{str(dtype).removeprefix('torch.')}: quantised weights are not supported; dequantise them first, "
                "for instance with transformers"
            )


def check_load(
    source: TensorSource,
    shapes: Mapping[str, tuple[int, ...]],
    rules: LoadRules,
    *,
    unused: Sequence[str] = (),
    beside: Collection[str] = (),
    idle_rules: Sequence[str] = (),
    remedies: Mapping[str, str] | None = None,
) -> LoadPlan:
    """As `plan_load`, and whether the rules allow it. A remedy that a sentence names is whole: it leads to a load.

    Args:
        source: under our names.
        shapes: of all of the model's parameters.
        rules: what may differ.
        unused: further names that nothing takes.
        beside: names that may lie there too: buffers, and copies of other tensors.
        idle_rules: rules of `load_rename` that changed no name.
        remedies: for some names a better one than the model that it was saved from.

    Raises:
        CheckpointError: something differs that may not.
    """
    plan = plan_load(source, shapes, unused=unused, beside=beside, idle_rules=idle_rules)
    for name in plan.resized:
        _check_rows(source, name, shapes[name], rules.vocabulary)
    if not plan.found:
        raise CheckpointError(_nothing_found(source, shapes, plan))
    if plan.idle_rules and rules.strict:
        raise CheckpointError(
            f"checkpoint.load_rename must hold rules that match a name in {source.place}, but {plan.idle_rules[0]!r} "
            f"matches none of {_some(source.infos)}; remove or correct it"
        )
    problem = _problem(source, shapes, plan, rules)
    if problem is not None:
        sentence, name = problem
        remedy = (remedies or {}).get(name) or "use the model it was saved from"
        if name in plan.resized:
            remedy = f"use model.vocab_size={source.infos[name].shape[0]}"
        raise CheckpointError(f"{sentence}; {remedy}, or {_fields_needed(plan, rules)}")
    return plan


def _problem(
    source: TensorSource, shapes: Mapping[str, tuple[int, ...]], plan: LoadPlan, rules: LoadRules
) -> tuple[str, str] | None:
    """What the rules do not allow, and the name that shows it."""
    if rules.strict and plan.missing:
        name = plan.missing[0]
        count = f"({len(plan.missing)} of {len(shapes)} are missing)"
        return f"{source.place} must hold {name}, but does not {count}", name
    if rules.strict and plan.unused:
        name = plan.unused[0]
        return f"{source.place} holds {name}, which the model does not have ({len(plan.unused)} such names)", name
    if plan.resized and not rules.resized:
        name = plan.resized[0]
        stored = source.infos[name].shape
        sentence = f"{name} in {source.place} has shape {stored}, but the model's has {shapes[name]}"
        return sentence, name
    return None


def _fields_needed(plan: LoadPlan, rules: LoadRules) -> str:
    """All fields that together let the load go on."""
    strict = rules.strict and bool(plan.missing or plan.unused)
    fields = ["checkpoint.load_strict=false"] * strict
    purposes = []
    if strict and plan.missing:
        purposes.append("start without them" if not plan.unused else "start without what is missing")
    if strict and plan.unused:
        purposes.append("leave them out" if not plan.missing else "leave out what is not used")
    if plan.resized and not rules.resized:
        fields.append("checkpoint.load_resized=true")
        purposes.append("load the rows that both have")
    return f"{' '.join(fields)} to {' and '.join(purposes)}"


def _nothing_found(source: TensorSource, shapes: Mapping[str, tuple[int, ...]], plan: LoadPlan) -> str:
    wanted = next(iter(shapes))
    prefix = next((n.removesuffix(wanted) for n in plan.unused if n.endswith(f".{wanted}")), None)
    remedy = "use the model it was saved from"
    if prefix is not None and all(f"{prefix}{n}" in plan.unused for n in shapes):
        rule = f"^{re.escape(prefix)}=>"
        remedy = f"""add 'checkpoint.load_rename=["{rule}"]'"""
    return (
        f"{source.place} must hold the model's {len(shapes)} tensors, {wanted} among them, but holds none of them: "
        f"it has {_some(source.infos)}; {remedy}"
    )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:2]) or "no tensor"
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown


def _check_rows(source: TensorSource, name: str, shape: tuple[int, ...], vocabulary: Collection[str]) -> None:
    """Raises CheckpointError where more than the number of tokens differs."""
    stored = source.infos[name].shape
    if len(stored) == len(shape) and stored[1:] == shape[1:] and name in vocabulary:
        return
    raise CheckpointError(
        f"{name} in {source.place} has shape {stored}, but the model's has {shape}; use the model's dimensions that "
        "it was saved with"
    )


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def moments_of(name: str) -> list[str]:
    """The flat names of AdamW's state of a parameter."""
    return [f"optimizer.state.{name}.{part}" for part in MOMENTS]


def check_moments(source: TensorSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether a checkpoint has the optimizer's state of all of a model's parameters, in their shapes.

    Raises:
        CheckpointError: it has not.
    """
    remedy = "use checkpoint.initial_load_model_only=true"
    if stored_step(source) is not None:
        remedy += ", or 'checkpoint.exclude_from_loading=[optimizer]' to go on from its step without"
    for name, shape in shapes.items():
        for moment in moments_of(name):
            if moment not in source.infos:
                raise CheckpointError(f"{source.place} must hold {moment}, but does not; {remedy}")
            stored = source.infos[moment].shape
            if stored != (() if moment.endswith(".step") else shape):
                raise CheckpointError(
                    f"{moment} in {source.place} has shape {stored}, but the model's tensor has {shape}; {remedy}"
                )


def stored_step(source: TensorSource) -> int | None:
    """The optimizer step at which a checkpoint was saved, by its counter, or else by the optimizer's own.

    Raises:
        CheckpointError: what should be a step is none.
    """
    names = ["train_state.step"] if "train_state.step" in source.infos else _step_counters(source)
    steps = []
    for name in names:
        info = source.infos[name]
        value = float(source.read(name, whole(info.shape))) if math.prod(info.shape) == 1 else math.nan
        if not (0 <= value <= _MOST_STEPS and value.is_integer()):
            raise CheckpointError(
                f"{name} in {source.place} must be a step, but is {value:g}; use "
                "checkpoint.initial_load_model_only=true"
            )
        steps.append(int(value))
    return max(steps, default=None)


_MOST_STEPS = 2**53


def _step_counters(source: TensorSource) -> list[str]:
    return [n for n in source.infos if n.startswith("optimizer.state.") and n.endswith(".step")]


def load_from(
    source: TensorSource,
    tensors: Mapping[str, Tensor],
    rules: LoadRules,
    *,
    optional: Collection[str] = (),
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Reads a source into existing tensors, each rank its own boxes, cast to the tensors' types.

    Args:
        source: under the tensors' names.
        tensors: DTensors receive this rank's part.
        rules: what may differ; `check_load` has looked at the whole model.
        optional: names that need not be there.
        threads: that read.
        progress: told the bytes of this rank's tensors that are filled, and in all.

    Raises:
        CheckpointError: a tensor is not there.
        DamagedStepError: a byte is not what was written.
    """
    needed = [n for n in tensors if n not in optional] if rules.strict else []
    missing = [n for n in needed if n not in source.infos]
    if missing:
        raise CheckpointError(
            f"{source.place} must hold {missing[0]}, but does not ({len(missing)} of {len(tensors)} are missing); "
            "use the model it was saved from, or checkpoint.load_strict=false to start without them"
        )
    with ThreadPoolExecutor(threads) as pool:
        jobs = {pool.submit(_fill, source, n, t, rules): t for n, t in tensors.items() if n in source.infos}
        total, done = sum(local_tensor(tensor).nbytes for tensor in jobs.values()), 0
        for job in as_completed(jobs) if progress is not None else jobs:
            job.result()
            done += local_tensor(jobs[job]).nbytes
            if progress is not None:
                progress(done, total)


@torch.no_grad()
def _fill(source: TensorSource, name: str, tensor: Tensor, rules: LoadRules) -> None:
    chunk, local, info = chunk_of(name, tensor), local_tensor(tensor), source.infos[name]
    if info.shape != chunk.global_shape:
        _check_rows(source, name, chunk.global_shape, rules.vocabulary)
        if not rules.resized:
            raise CheckpointError(
                f"{name} in {source.place} has shape {info.shape}, but the model's has {chunk.global_shape}; use "
                "checkpoint.load_resized=true to load the rows that both have"
            )
    box = tuple(
        (o, max(o, min(o + n, have))) for o, n, have in zip(chunk.offset, chunk.shape, info.shape, strict=True)
    )
    if any(start == stop for start, stop in box):
        return
    for dim, (start, stop) in enumerate(box):
        local = local.narrow(dim, 0, stop - start)
    source.read_into(name, box, local)
