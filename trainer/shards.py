"""What of a parameter lies on this rank, and the way back: for optimizers, which work on shards."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["like_parameter", "local_part"]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_parameter(local: Tensor, parameter: nn.Parameter) -> Tensor:
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
