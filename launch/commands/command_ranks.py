"""Several ranks of a command that asks a model: they share its matrices, or what it is asked, or both.

They are started here (`--ranks`), or by torchrun or srun, each with the same arguments. The first one speaks.
"""

import argparse
import atexit
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from regrow.checkpoint.scratch import scratch_folder
from regrow.checkpoint.storage.base import Storage
from regrow.errors import ConfigError
from regrow.launch.commands.ending import SAYS_WHY
from regrow.launch.exit_code import ExitCode
from regrow.launch.run.elastic import elastic_config
from regrow.launch.run.ranks import Ranks, detect_ranks, export_ranks
from regrow.trainer.device import pin_threads
from regrow.trainer.parallel.context import ParallelContext, close_parallel, open_parallel
from regrow.trainer.parallel.layout import Layout, divisors_of
from regrow.trainer.process import PARENT_VARIABLE, die_with_parent

__all__ = ["ALONE", "CommandRanks", "on_ranks"]

T = TypeVar("T")

# Somebody who talks with a model may take long for a line, for which the other ranks wait.
_PATIENCE_S = 7 * 24 * 3600.0
_LATER_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandRanks:
    """This process among those of the command.

    Attributes:
        context: process groups and meshes; None where it is alone.
    """

    context: ParallelContext | None = None

    @property
    def speaks(self) -> bool:
        """Whether this one prints and writes."""
        return self.context is None or self.context.is_main

    @property
    def shares_model(self) -> bool:
        """Whether several ranks hold one model together."""
        return self.context is not None and self.context.layout.tp > 1

    def told(self, make: Callable[[], T]) -> T:
        """What the first rank finds, on every rank."""
        if self.context is None:
            return make()
        found = [make() if self.speaks else None]
        dist.broadcast_object_list(found, group=self.context.cpu_group, group_src=0)
        # None but of another rank stands for a value that has not come.
        value: T = found[0]  # type: ignore[assignment]
        return value

    def same_place(self, base: Storage, choose: Callable[[], Storage]) -> Storage:
        """The place that the first rank chooses, on every rank, whatever a run commits meanwhile.

        Args:
            base: alike on all ranks.
            choose: gives it, or what lies below it.
        """
        if self.context is None:
            return choose()
        below = self.told(lambda: choose().url).removeprefix(base.url).strip("/")
        return base.child(below) if below else base

    def share_out(self, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[object]]) -> list[object]:
        """What `work` makes of each item, of which the models take every so many.

        Args:
            items: the same on every rank; neighbours should cost alike.
            work: is called by the ranks of one model with the same items.
        """
        context = self.context
        if context is None or context.layout.data_ranks == 1:
            return list(work(items))
        first, step = context.data_rank, context.layout.data_ranks
        parts: list[list[object]] = [[] for _ in range(context.world_size)]
        own = (first, list(work(items[first::step])))
        dist.all_gather_object(parts, own, group=context.cpu_group)
        made: list[object] = [None] * len(items)
        for begins, part in parts:
            made[begins::step] = part  # type: ignore[call-overload]
        return made


ALONE = CommandRanks()


def on_ranks(args: argparse.Namespace, module: str, work: Callable[[CommandRanks], object]) -> ExitCode:
    """Does a command's work on as many ranks as are wanted, starting them where nobody has.

    Args:
        args: with `ranks`, `tp` and `device`.
        module: of the command, which is started again for each rank, with the arguments of this process.
        work: told of the ranks.

    Raises:
        ConfigError: there cannot be so many.
    """
    if PARENT_VARIABLE in os.environ:
        die_with_parent(int(os.environ.pop(PARENT_VARIABLE)))
    given = detect_ranks(os.environ, None)
    count = given.world_size if given is not None else args.ranks or args.tp
    for option, value in (("--tp", args.tp), ("--ranks", args.ranks)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} must be at least 1, but is {value}; use 1")
    if count % args.tp:
        raise ConfigError(f"--tp must divide the ranks ({count}), but is {args.tp}; use {divisors_of(count)}")
    if given is not None and args.ranks not in (None, count):
        raise ConfigError(
            f"--ranks must be what was started ({count}), but is {args.ranks}; leave it out under torchrun and srun"
        )
    if count == 1:
        work(ALONE)
        return ExitCode.done
    if args.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device must be cpu, cuda or auto with several ranks, but is {args.device}; use cuda")
    if given is None:
        return _start(module, sys.argv[1:], count)
    with _joined(given, args.tp, args.device) as ranks:
        work(ranks)
    return ExitCode.done


def _start(module: str, arguments: Sequence[str], count: int) -> ExitCode:
    """Starts the ranks here; they print for themselves."""
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The ranks say themselves why they end.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with scratch_folder() as folder:
        try:
            elastic_launch(elastic_config(count, folder), sys.executable)("-P", "-u", "-m", module, *arguments)
        except ChildFailedError as error:
            _, first = error.get_first_failure()
            return ExitCode.bad_input if first.exitcode == ExitCode.bad_input else ExitCode.failed
        finally:
            os.environ.pop(PARENT_VARIABLE, None)
    return ExitCode.done


@contextmanager
def _joined(given: Ranks, tp: int, device: str) -> Iterator[CommandRanks]:
    export_ranks(given)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cpu":
        pin_threads(0, given.local_world_size)
    context = open_parallel(Layout(dp_shard=given.world_size // tp, tp=tp), kind, _PATIENCE_S)
    try:
        yield CommandRanks(context=context)
    except SAYS_WHY:
        atexit.register(os._exit, ExitCode.bad_input)
        if not context.is_main:
            # The first rank has met the same, and says so; the agent then ends this one.
            time.sleep(_LATER_S)
        raise
    except BaseException:
        # Leaving the groups would wait for ranks that are not coming.
        atexit.register(os._exit, ExitCode.failed)
        raise
    close_parallel()
