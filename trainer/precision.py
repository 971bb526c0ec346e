"""What a run's precision makes of a model, and which machines can run it."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from regrow.errors import ConfigError
from regrow.models.base import LanguageModel
from regrow.trainer.config import PrecisionConfig, PrecisionName

__all__ = ["change_parameters", "change_precision", "check_precision", "compute_dtype", "gather_small"]

_COMPUTE = {
    PrecisionName.fp32: torch.float32,
    PrecisionName.bf16: torch.bfloat16,
    PrecisionName.fp64: torch.float64,
    PrecisionName.bf16_params: torch.bfloat16,
    PrecisionName.fp8: torch.bfloat16,
}
_PARAMETERS = {PrecisionName.fp64: torch.float64, PrecisionName.bf16_params: torch.bfloat16}
# The first of NVIDIA's that multiplies in 8 bits: Ada (8.9).
_FP8_CAPABILITY = (8, 9)


def compute_dtype(precision: PrecisionName) -> torch.dtype:
    """Of the activations between layers."""
    return _COMPUTE[precision]


def check_precision(precision: PrecisionConfig, device_type: str) -> None:
    """Whether this machine can compute like this.

    Args:
        precision: the section.
        device_type: `cpu` or `cuda`.

    Raises:
        ConfigError: it cannot, or a field is out of its range.
    """
    if precision.fp8_min_features < 0:
        raise ConfigError(
            f"precision.fp8_min_features must be at least 0, but is {precision.fp8_min_features}; use 1024"
        )
    if precision.name is not PrecisionName.fp8:
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "precision.name must not be fp8 without torchao, but is; install it with pip install 'regrow[fp8]', or "
            "use precision=bf16"
        )
    if device_type == "cuda" and (found := torch.cuda.get_device_capability()) < _FP8_CAPABILITY:
        raise ConfigError(
            f"precision.name must not be fp8 on {torch.cuda.get_device_name()}, whose compute capability "
            f"({found[0]}.{found[1]}) is below {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} and has no products in 8 "
            "bits, but is; use precision=bf16"
        )


def change_parameters(model: LanguageModel, precision: PrecisionName) -> None:
    """Gives a model made in float32, on the meta device, parameters of the precision's dtype."""
    dtype = _PARAMETERS.get(precision)
    if dtype is not None:
        for parameter in model.parameters():
            # Tables and counters have dtypes of their own.
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def change_precision(model: LanguageModel, precision: PrecisionConfig, *, device_type: str, tp: int) -> None:
    """Gives a model made in float32 its parameters' dtype and its layers' products.

    Args:
        model: on the meta device; changed in place.
        precision: the section.
        device_type: `cpu` or `cuda`.
        tp: ranks that will share a matrix.
    """
    change_parameters(model, precision.name)
    if precision.name is PrecisionName.fp8:
        # torchao is an extra, takes seconds to import, and warns of parts of it that are not used here.
        with _quiet():
            from regrow.trainer.float8 import convert_linears
        convert_linears(model, precision, device_type=device_type, tp=tp)


def gather_small(block: torch.nn.Module, precision: PrecisionConfig, shards: int) -> None:
    """Lets FSDP gather in 8 bits what is multiplied in 8 bits; before it cuts the block into shards."""
    if precision.name is PrecisionName.fp8 and shards > 1:
        # As above.
        from regrow.trainer.float8 import gather_in_float8

        gather_in_float8(block, precision, shards)


@contextmanager
def _quiet() -> Iterator[None]:
    """Logs errors alone."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
