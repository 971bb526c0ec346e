"""Starting from weights that lie elsewhere: any source, into parameters of any layout, whole or in part."""

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from checkpoint.config import CheckpointConfig
from checkpoint.errors import CheckpointError
from checkpoint.plan import chunk_of, local_tensor
from checkpoint.source import Box, TensorInfo, TensorSource, pieces_of

__all__ = ["LoadPlan", "LoadRules", "RenamedSource", "check_load", "load_from", "weights_of"]

_PIECE_BYTES = 32 << 20
# What lies beside the weights, or can be computed from the config.
_NOT_WEIGHTS = re.compile(
    r"^(optimizer|train_state|lr_scheduler|dataloader|data_loader)(\.|$)|rotary_emb\.inv_freq$|^rope\.freqs$|^freqs_cis$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRules:
    """How names and shapes may differ.

    Attributes:
        strict: every tensor must be found, and every stored weight used.
        rename: (pattern, replacement) pairs, applied in order to the stored names (`re.sub`).
        resized: load the rows that both have where the number of rows differs.
    """

    strict: bool = True
    rename: tuple[tuple[str, str], ...] = ()
    resized: bool = False

    @classmethod
    def from_config(cls, config: CheckpointConfig) -> "LoadRules":
        """Reads `load_strict`, `load_rename` and `load_resized`.

        Raises:
            ValueError: a rule that cannot be read.
        """
        pairs = []
        for rule in config.load_rename:
            pattern, arrow, replacement = rule.partition("=>")
            try:
                re.compile(pattern)
                re.sub(pattern, replacement.strip(), "")
            except re.error as error:
                raise ValueError(
                    f"checkpoint.load_rename must hold rules PATTERN=>REPLACEMENT, but {rule!r} is no regular "
                    f"expression ({error}); escape dots as \\\\."
                ) from error
            if not arrow or not pattern.strip():
                raise ValueError(
                    f"checkpoint.load_rename must hold rules PATTERN=>REPLACEMENT, but holds {rule!r}; "
                    "write for instance '^model\\\\.=>'"
                )
            pairs.append((pattern.strip(), replacement.strip()))
        return cls(strict=config.load_strict, rename=tuple(pairs), resized=config.load_resized)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """What a load does.

    Attributes:
        found: names that are loaded.
        missing: names of the model that the checkpoint does not have.
        unused: weights of the checkpoint that the model does not have.
        resized: names of which a part of the rows is loaded.
    """

    found: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    resized: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people: what was left out."""
        words = {
            "not found, so as they start": self.missing,
            "not used": self.unused,
            "rows that both have": self.resized,
        }
        return [f"{len(names)} tensors {what}: {', '.join(names)}" for what, names in words.items() if names]


@final
class RenamedSource(TensorSource):
    """A source under other names.

    Args:
        source: the tensors.
        rules: (pattern, replacement) pairs.

    Raises:
        CheckpointError: two tensors would get one name.
    """

    def __init__(self, source: TensorSource, rules: Sequence[tuple[str, str]]) -> None:
        self.place = source.place
        self._source = source
        self._names: dict[str, str] = {}
        for stored in source.infos:
            name = stored
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            if name in self._names:
                raise CheckpointError(
                    f"checkpoint.load_rename must keep names apart, but {stored} and {self._names[name]} both become "
                    f"{name}; narrow the pattern"
                )
            self._names[name] = stored
        self.infos: Mapping[str, TensorInfo] = {n: source.infos[stored] for n, stored in self._names.items()}

    def read(self, name: str, box: Box) -> Tensor:
        return self._source.read(self._names[name], box)

    def close(self) -> None:
        self._source.close()


def weights_of(source: TensorSource) -> list[str]:
    """The names that are a model's, not an optimizer's or a counter."""
    return [name for name in source.infos if not _NOT_WEIGHTS.search(name)]


def check_load(
    source: TensorSource, shapes: Mapping[str, tuple[int, ...]], rules: LoadRules, *, unused: Sequence[str] = ()
) -> LoadPlan:
    """What loading a whole model would do; reads no tensor.

    Args:
        source: under our names.
        shapes: of all of the model's parameters.
        rules: what may differ.
        unused: further names that nothing takes.

    Raises:
        CheckpointError: something differs that may not.
    """
    weights = weights_of(source)
    missing = [n for n in shapes if n not in source.infos]
    # A tied output layer may lie there although it is the embedding.
    extra = [n for n in [*weights, *unused] if n not in shapes and n not in ("output.weight", "lm_head.weight")]
    resized = [n for n in shapes if n in source.infos and source.infos[n].shape != shapes[n]]
    if rules.strict and missing:
        raise CheckpointError(
            f"{source.place} must hold {missing[0]}, but does not ({len(missing)} of {len(shapes)} are missing); "
            "use the model it was saved from, or checkpoint.load_strict=false to start without them"
        )
    if rules.strict and extra:
        raise CheckpointError(
            f"{source.place} holds {extra[0]}, which the model does not have ({len(extra)} such names); use the "
            "model it was saved from, or checkpoint.load_strict=false to leave them out"
        )
    for name in resized:
        _check_rows(source, name, shapes[name], rules)
    return LoadPlan(
        found=tuple(n for n in shapes if n in source.infos),
        missing=tuple(missing),
        unused=tuple(extra),
        resized=tuple(resized),
    )


def _check_rows(source: TensorSource, name: str, shape: tuple[int, ...], rules: LoadRules) -> None:
    stored = source.infos[name].shape
    rows_only = len(stored) == len(shape) and stored[1:] == shape[1:] and name in _VOCABULARY
    if rows_only and rules.resized:
        return
    remedy = "use the model's dimensions that it was saved with"
    if rows_only:
        remedy = f"use model.vocab_size={stored[0]}, or checkpoint.load_resized=true to load the rows that both have"
    raise CheckpointError(f"{name} in {source.place} has shape {stored}, but the model's has {shape}; {remedy}")


# The tensors whose rows are words.
_VOCABULARY = ("tok_embeddings.weight", "output.weight")


def load_from(
    source: TensorSource,
    tensors: Mapping[str, Tensor],
    rules: LoadRules,
    *,
    optional: Collection[str] = (),
    threads: int = 4,
) -> None:
    """Reads a source into existing tensors, each rank its own boxes, cast to the tensors' types.

    Args:
        source: under the tensors' names.
        tensors: DTensors receive this rank's part.
        rules: what may differ; `check_load` has looked at the whole model.
        optional: names that need not be there.
        threads: that read.

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
        jobs = [pool.submit(_fill, source, n, t, rules) for n, t in tensors.items() if n in source.infos]
        for job in jobs:
            job.result()


@torch.no_grad()
def _fill(source: TensorSource, name: str, tensor: Tensor, rules: LoadRules) -> None:
    chunk, local, info = chunk_of(name, tensor), local_tensor(tensor), source.infos[name]
    if info.shape != chunk.global_shape:
        _check_rows(source, name, chunk.global_shape, rules)
    box = tuple(
        (o, max(o, min(o + n, have))) for o, n, have in zip(chunk.offset, chunk.shape, info.shape, strict=True)
    )
    if any(start == stop for start, stop in box):
        return
    for piece in pieces_of(box, info.dtype.itemsize, _PIECE_BYTES):
        target = local
        for dim, ((start, stop), origin) in enumerate(zip(piece, chunk.offset, strict=True)):
            target = target.narrow(dim, start - origin, stop - start)
        target.copy_(source.read(name, piece))
