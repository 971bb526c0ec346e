"""A model and what belongs to it, out of a run, a step or a Hugging Face folder."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.load.initial_load import LoadRules, load_from, pin_source
from regrow.checkpoint.load.loading import is_verified
from regrow.checkpoint.run.reader_lock import reading
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage
from regrow.checkpoint.storage.opening import as_storage
from regrow.errors import ConfigError
from regrow.launch.commands.command_ranks import ALONE, CommandRanks
from regrow.launch.commands.convert import check_fit
from regrow.launch.commands.identify_model import model_of, run_folder_of, section_of_run
from regrow.launch.run.stored_run import steps_place
from regrow.launch.run.weights import OpenedWeights, buffers_of, model_on_meta, open_weights
from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.trainer.bars import Bar
from regrow.trainer.data.tokenizer import load_tokenizer, parse_tokenizer, tokenizer_file
from regrow.trainer.parallel.shared_model import share_model

__all__ = ["TOKENIZER", "LoadedModel", "open_model", "open_on"]

TOKENIZER = "tokenizer.json"
_TOKENIZER_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        model: in eval mode, with its weights.
        tokenizer: its tokenizer.
        tokenizer_folder: where that lies, if it lies here; a chat template may lie beside it.
        data: the run's section of that name; empty where there is no run.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    tokenizer_folder: Path | None
    data: dict[str, Any]


def open_model(
    place: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
    step: Storage | None = None,
    ranks: CommandRanks = ALONE,
) -> LoadedModel:
    """See `regrow.load_model`.

    Args:
        place: as there.
        dtype: as there.
        device: as there.
        tokenizer: as there.
        step: of the run at `place`, instead of the newest.
        ranks: which may hold the model together.
    """
    given = as_storage(str(place) if "://" in str(place) else Path(place).expanduser())
    with ExitStack() as held:
        base = steps_place(given)
        stored = step or ranks.same_place(base, lambda: pin_source(base))
        if is_verified(stored):
            held.enter_context(reading(stored))
        config = model_of(stored, None)
        found, folder = _tokenizer(given, stored, tokenizer)
        opened = open_weights(stored, config)
        held.callback(opened.source.close)
        check_fit(opened, config)
        model = model_on_meta(config)
        assert isinstance(config, DecoderConfig), "other models have no tables of positions"
        if ranks.context is not None and ranks.shares_model:
            share_model(model, config, ranks.context.meshes.dense["tp"])
        _give_memory(model, dtype or _stored_dtype(opened, model), torch.device(device))
        model.init_buffers(torch.device(device), config.max_seq_len)
        tensors = dict(model.named_parameters()) | {
            n: b for n, b in model.named_buffers() if n in buffers_of(config) and n in opened.source.infos
        }
        with Bar("loading") as bar:
            load_from(opened.source, tensors, LoadRules(strict=True), progress=bar.update)
        data = section_of_run(stored, "data")
    return LoadedModel(model=model.eval(), tokenizer=found, tokenizer_folder=folder, data=data)


def open_on(
    place: str,
    *,
    device: str,
    dtype: str | None,
    tokenizer: str | None,
    step: Storage | None = None,
    ranks: CommandRanks = ALONE,
) -> LoadedModel:
    """See `open_model`, with options as a command has them.

    Args:
        place: the checkpoint.
        device: `auto` is a GPU where there is one.
        dtype: by its name in torch; None is as stored.
        tokenizer: a file or folder.
        step: see `open_model`.
        ranks: see `open_model`; each has a device of its own.

    Raises:
        ConfigError: there is no such device.
        ValueError: see `open_model`.
    """
    if ranks.context is not None:
        device = str(ranks.context.device)
    elif device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device must be one that is here, but is {device} ({reason}); use cpu") from None
    chosen = None if dtype is None else getattr(torch, dtype)
    return open_model(place, dtype=chosen, device=device, tokenizer=tokenizer, step=step, ranks=ranks)


def _stored_dtype(opened: OpenedWeights, model: nn.Module) -> torch.dtype:
    """That of most of the stored weights."""
    infos = opened.source.infos
    counts = Counter({infos[n].dtype: 0 for n, _ in model.named_parameters()})
    for name, parameter in model.named_parameters():
        counts[infos[name].dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _give_memory(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the parameters of a model on the meta device; what is one parameter under two names stays one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in made:
            made[parameter] = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device=device))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[parameter])


def _tokenizer(given: Storage, stored: Storage, path: str | Path | None) -> tuple[Tokenizer, Path | None]:
    """The one that is named, or that lies beside the weights or in their run's directory; and its folder."""
    if path is not None:
        file = tokenizer_file(str(path))
        return load_tokenizer(file), file.parent
    for place in (given, stored):
        if place.exists(TOKENIZER):
            found = parse_tokenizer(place.read(TOKENIZER, _TOKENIZER_BYTES), Path(place.url) / TOKENIZER)
            return found, place.path if isinstance(place, LocalStorage) else None
    run = run_folder_of(stored)
    if run is not None and (run / TOKENIZER).is_file():
        return load_tokenizer(run / TOKENIZER), run
    raise CheckpointError(
        f"{stored.url} must have a {TOKENIZER} beside it or in its run's directory, but has none; give tokenizer=PATH"
    )
