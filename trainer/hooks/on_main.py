"""What rank 0 does for all ranks, none of which goes on where it fails."""

from collections.abc import Callable

import torch.distributed as dist

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.run.lease import LeaseLostError
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.run_record import RunRecordError

__all__ = ["run_on_main"]


def run_on_main(context: ParallelContext, act: Callable[[], None]) -> None:
    """Has rank 0 act and the others wait for how it went.

    Raises:
        LeaseLostError: on all ranks, where rank 0's act raised it.
        CheckpointError: likewise, also for what the storage refused.
    """
    failed: list[tuple[bool, str] | None] = [None]
    if context.is_main:
        try:
            act()
        except (CheckpointError, RunRecordError) as error:
            failed[0] = (isinstance(error, LeaseLostError), str(error))
        except OSError as error:
            where = error.filename if error.filename is not None else "a file of the run"
            reason = error.strerror or str(error)
            failed[0] = (
                False,
                f"run.root and checkpoint.folder must be on a storage that works, but {where} cannot be used "
                f"({reason}); mend it and give the same command again",
            )
    if context.world_size > 1:
        dist.broadcast_object_list(failed, group=context.cpu_group, group_src=0)
    if failed[0] is not None:
        lost, message = failed[0]
        raise (LeaseLostError if lost else CheckpointError)(message)
