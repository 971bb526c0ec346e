"""What of a parameter lies on this rank, and the way back: for optimizers, which work on shards."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regrow.checkpoint.format.layout import local_box

__all__ = ["like_parameter", "local_part", "plain_parameter", "shard_offset"]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, a plain tensor; it shares its memory."""
    return _plain(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def _plain(local: Tensor) -> Tensor:
    """The tensor within one that tells FSDP how to gather it (in 8 bits); others themselves."""
    if not hasattr(local, "fsdp_pre_all_gather"):
        return local
    inner: Tensor = getattr(local, local.__tensor_flatten__()[0][0])  # type: ignore[attr-defined]
    return inner


def plain_parameter(parameter: nn.Parameter) -> Tensor:
    """A parameter without its gradient, for checkpoints: a plain tensor, or a DTensor of plain ones."""
    tensor = parameter.detach()
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    plain = _plain(held)
    return tensor if plain is held else like_parameter(plain, parameter)


def shard_offset(parameter: Tensor) -> tuple[int, ...]:
    """Where this rank's part of a parameter begins in the whole."""
    if not isinstance(parameter, DTensor):
        return (0,) * parameter.ndim
    return local_box(parameter.shape, parameter.device_mesh, parameter.placements)[1]


def like_parameter(local: Tensor, parameter: Tensor) -> Tensor:
    """`local` as the same kind of shard as `parameter`, whose local shape it has."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
