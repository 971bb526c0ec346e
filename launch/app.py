"""What happens between Hydra's config and the ranks."""

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any, final

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from launch.errors import UserError, check_arguments, describe
from launch.run_name import register_resolver
from launch.schema import Config, register_schemas
from launch.signals import StopFlag
from launch.typed import plain, to_config
from launch.worker import Outcome, RankSpec, log_to_console, run_rank

__all__ = ["Application"]

log = logging.getLogger(__name__)


@final
class Application:
    """One invocation of `regrow`: Hydra calls it once for a run and once for each run of a sweep here.

    Args:
        flag: the process' signal handler.
        full_error: print tracebacks for bad input too.
    """

    def __init__(self, flag: StopFlag, *, full_error: bool) -> None:
        self._flag = flag
        self._full_error = full_error
        self._codes: list[int] = []

    def run(self, arguments: list[str]) -> None:
        """Hands the command line to Hydra.

        Raises:
            UserError and Hydra's own errors, for what cannot be composed.
        """
        check_arguments(arguments)
        register_resolver()
        register_schemas()
        log_to_console()
        if any(a.startswith("hydra/launcher=") for a in arguments) and not {"-m", "--multirun"} & set(arguments):
            arguments = [*arguments, "--multirun"]
        # argparse takes overrides on one side of a flag only.
        sweeping = [a for a in arguments if a in ("-m", "--multirun")]
        sys.argv[1:] = [*sweeping[:1], *(a for a in arguments if a not in ("-m", "--multirun"))]
        hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")(self._task)()

    def exit_code(self) -> int:
        """That of the run, or the gravest of the sweep's: failed, bad input, resumable, done."""
        gravity = (1, 2, 3, 0)
        return min(self._codes, key=gravity.index, default=0)

    def _task(self, config: DictConfig) -> None:
        if 3 in self._codes:
            return  # a sweep that was asked to stop starts no further run
        try:
            outcome = self._train(config)
            if outcome.message:
                print(f"error: {outcome.message}", file=sys.stderr)
            self._codes.append(outcome.exit_code)
        except Exception as error:
            sentence = str(error) if isinstance(error, Refused) else describe(error)
            if sentence is None or self._full_error:
                traceback.print_exc()
            if sentence is not None:
                print(f"error: {sentence}", file=sys.stderr)
            self._codes.append(1 if sentence is None else 2)

    def _train(self, config: DictConfig) -> Outcome:
        hydra_config = HydraConfig.get()
        run_dir = Path(hydra_config.runtime.output_dir)
        sweep = Path(config.run.root).name if hydra_config.mode is RunMode.MULTIRUN else None
        try:
            spec, external = _prepare(config, run_dir, sweep)
        except (ValueError, FileNotFoundError, OSError) as error:
            _remove_if_empty(run_dir)
            if describe(error) is not None:
                raise
            raise Refused(str(error)) from error
        if external:
            return _train_external(spec, self._flag, list(hydra_config.overrides.task))
        return self._train_here(spec, list(hydra_config.overrides.task))

    def _train_here(self, spec: RankSpec, overrides: list[str]) -> Outcome:
        from launch.run_dir import own_run

        with own_run(spec.run_dir):
            try:
                finished = _open(spec, overrides, may_rewind=True)
            except (ValueError, FileNotFoundError) as error:
                raise Refused(str(error)) from error
            if finished:
                return _already_finished(spec)
            if spec.layout.world_size > 1 or spec.config.launch.max_restarts > 0:
                from launch.local import run_local

                outcome = run_local(spec)
            else:
                self._flag.defer(deferring=True)
                try:
                    outcome = run_rank(spec, self._flag)
                finally:
                    self._flag.defer(deferring=False)
        log.info("%s at step %d: %s", outcome.kind, outcome.step, spec.run_dir)
        return outcome


class Refused(UserError):
    """Bad input found in preflight."""


def _already_finished(spec: RankSpec) -> Outcome:
    steps = spec.config.train.steps
    log.info("finished already at step %d: %s; raise train.steps to go on", steps, spec.run_dir)
    return Outcome(kind="finished", step=steps)


def _remove_if_empty(run_dir: Path) -> None:
    """Hydra makes the folder before it asks us; a refused command leaves nothing behind."""
    try:
        run_dir.rmdir()
    except OSError:
        return


def _prepare(config: DictConfig, run_dir: Path, sweep: str | None) -> tuple[RankSpec, bool]:
    """All checks that need no process group, and the data. Also says whether ranks were started for us."""
    typed = to_config(config)
    from launch.preflight import check_config, check_disk, check_launch, prepare_data
    from launch.ranks import detect_ranks, export_ranks
    from trainer.device import pick_device_type
    from trainer.parallel.layout import resolve_layout

    check_config(typed)
    device_type = pick_device_type(typed.launch.device.value)
    ranks = detect_ranks(os.environ, _degrees(typed))
    available = ranks.world_size if ranks is not None else _local_devices(device_type)
    layout = resolve_layout(typed.parallel, available, ranks_are_given=ranks is not None)
    check_launch(typed, layout, device_type, ranks_are_given=ranks is not None)
    if ranks is not None:
        export_ranks(ranks)
    check_disk(typed, run_dir)
    spec = RankSpec(
        config=typed,
        settings=plain(config),
        layout=layout,
        device_type=device_type,
        run_dir=run_dir,
        data_folder=prepare_data(typed),
        sweep=sweep,
    )
    return spec, ranks is not None


def _degrees(config: Config) -> int | None:
    p = config.parallel
    return None if p.dp_shard < 1 else p.dp_replicate * p.dp_shard * p.tp * p.pp * p.cp


def _local_devices(device_type: str) -> int:
    import torch

    return torch.cuda.device_count() if device_type == "cuda" else 1


def _open(spec: RankSpec, overrides: list[str], *, may_rewind: bool) -> bool:
    """Opens the run; true when there is nothing left to do."""
    from launch.run_dir import is_finished, open_run
    from trainer.data.token_store import TokenStore

    store = TokenStore(spec.data_folder)
    record = open_run(spec.config, spec.settings, spec.run_dir, store, may_rewind=may_rewind, overrides=overrides)
    return is_finished(record, spec.config.train.steps)


def _train_external(spec: RankSpec, flag: StopFlag, overrides: list[str]) -> Outcome:
    """A rank that torchrun or srun started: rank 0 opens the run, the others wait for its word."""
    import contextlib

    from launch.rendezvous import share_from_rank_zero
    from launch.run_dir import own_run

    is_main = os.environ["RANK"] == "0"
    with own_run(spec.run_dir) if is_main else contextlib.nullcontext():

        def open_run_here() -> bool:
            return _open(spec, overrides, may_rewind=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0")

        opened: Any = share_from_rank_zero(open_run_here, spec.config.launch.timeout_s)
        if isinstance(opened, str):
            raise Refused(opened)
        if opened:
            return _already_finished(spec)
        flag.defer(deferring=True)
        try:
            return run_rank(spec, flag)
        finally:
            flag.defer(deferring=False)
