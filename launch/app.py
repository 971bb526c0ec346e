"""What happens between Hydra's config and the ranks."""

import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from regrow.checkpoint.run.lease import FencingToken
from regrow.launch.config.errors import (
    UserError,
    check_arguments,
    check_chdir,
    describe,
    describe_run_folder,
    naming_fields,
)
from regrow.launch.config.overrides import is_multirun, swept_keys
from regrow.launch.config.package_configs import use_packages
from regrow.launch.config.plugins import UserPackages
from regrow.launch.config.run_name import register_resolver
from regrow.launch.config.schema import Config, Device, register_schemas
from regrow.launch.config.typed import to_config, to_dict
from regrow.launch.run.failures import RankFailed, clear_failures, first_failure
from regrow.launch.run.signals import STOP_NOTE_VARIABLE, StopFlag
from regrow.launch.run.threads import threads_per_rank
from regrow.launch.run.worker import Outcome, RankSpec, log_to_console, run_rank
from regrow.launch.sweep.status import RunFailed, result_of
from regrow.trainer.config import ParallelConfig

if TYPE_CHECKING:
    from regrow.launch.run.run_dir import OpenedRun

__all__ = ["Application"]

log = logging.getLogger(__name__)

EXIT_RESUMABLE = 3
# Set by launchers that start a sweep's runs one by one.
SWEEP_VARIABLE = "REGROW_SWEEP"


@final
class Application:
    """One invocation of `regrow`: Hydra calls it once for a run and once for each run of a sweep here.

    Args:
        flag: the process' signal handler.
        full_error: print tracebacks for bad input too.
    """

    def __init__(self, flag: StopFlag, *, full_error: bool) -> None:
        # First, so that another process has the packages before it meets what is theirs.
        self._packages = UserPackages()
        self._flag = flag
        self._full_error = full_error
        self._codes: list[int] = []
        self._swept: list[str] = []
        self._folders: set[Path] = set()
        self._home = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that joblib or submitit started for a run of a sweep."""
        self.__dict__.update(state)
        register_resolver(self._swept)
        register_schemas()
        log_to_console()

    def run(self, arguments: list[str]) -> None:
        """Hands the command line to Hydra.

        Raises:
            UserError and Hydra's own errors, for what cannot be composed.
        """
        self._packages = use_packages()
        check_arguments(arguments)
        self._swept = swept_keys(arguments)
        register_resolver(self._swept)
        launching = any(a.startswith("hydra/launcher=") for a in arguments)
        if launching:
            from regrow.launch.sweep.launchers import register_launchers

            register_launchers()
        showing = any(a.startswith(("--info", "--cfg", "--help", "--hydra-help")) for a in arguments)
        if not showing:
            # Hydra prints these itself, through loggers that would reach our console a second time.
            log_to_console()
        if is_multirun(arguments) and not showing and not {"-m", "--multirun"} & set(arguments):
            arguments = [*arguments, "--multirun"]
        # argparse takes overrides on one side of a flag only.
        sweeping = [a for a in arguments if a in ("-m", "--multirun")]
        sys.argv[1:] = [*sweeping[:1], *(a for a in arguments if a not in ("-m", "--multirun"))]
        try:
            hydra.main(config_path="pkg://regrow.conf", config_name="config", version_base="1.3")(self._task)()
        except RunFailed as error:
            print(f"error: {error}", file=sys.stderr)
            self._codes.append(error.exit_code)
        except HydraException:
            raise
        except OSError as error:
            # Those of a run itself never come here.
            raise UserError(describe_run_folder(error, arguments)) from error
        finally:
            if any(a.startswith("hydra/launcher=joblib") for a in arguments):
                from joblib.externals.loky import get_reusable_executor

                # Its processes would outlive this one by five minutes, which ends without Python's own clean-up.
                get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)

    def exit_code(self) -> int:
        """That of the run, or the gravest of the sweep's: failed, bad input, resumable, done."""
        gravity = (1, 2, 3, 0)
        return min(self._codes, key=gravity.index, default=0)

    def _task(self, config: DictConfig) -> float | None:
        """One run; returns its result, for sweepers that optimise."""
        if EXIT_RESUMABLE in self._codes:
            return None  # a sweep that was asked to stop starts no further run
        away = os.getpid() != self._home
        if away:
            self._flag.install()
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        self._run_once(config)
        if away and self._codes[-1]:
            raise RunFailed(f"{run_dir.name} ended with exit code {self._codes[-1]}", exit_code=self._codes[-1])
        return result_of(run_dir)

    def _run_once(self, config: DictConfig) -> None:
        from regrow.trainer.hooks.startup import begin

        begin()
        try:
            outcome, external = self._train(config)
            if outcome.message:
                print(f"error: {outcome.message}", file=sys.stderr)
            # An elastic agent would start again what ends with anything but 0, and srun would kill the ranks that are
            # a moment slower; the stop record tells the rest.
            recorded = external and ("TORCHELASTIC_RUN_ID" in os.environ or STOP_NOTE_VARIABLE in os.environ)
            self._codes.append(0 if recorded else outcome.exit_code)
            if "SUBMITIT_EXECUTOR" in os.environ and outcome.exit_code == EXIT_RESUMABLE:
                from regrow.launch.sweep.submitit import stay_until_killed

                stay_until_killed(requeue=outcome.kind == "preempted")
        except UserError as error:
            if self._full_error:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            self._codes.append(2)
        except RankFailed as error:
            # Another rank may have failed before this one, which then saw it go.
            print(f"error: {first_failure(Path(HydraConfig.get().runtime.output_dir)) or error}", file=sys.stderr)
            self._codes.append(error.exit_code)
        except Exception:
            traceback.print_exc()
            failure = first_failure(Path(HydraConfig.get().runtime.output_dir))
            if failure is not None:
                # Of several ranks the one that failed first says why; the others saw it go.
                print(f"error: {failure}", file=sys.stderr)
            self._codes.append(1)

    def _train(self, config: DictConfig) -> tuple[Outcome, bool]:
        hydra_config = HydraConfig.get()
        run_dir = Path(hydra_config.runtime.output_dir)
        self._check_folder(run_dir, hydra_config)
        sweep = Path(config.run.root).name if hydra_config.mode is RunMode.MULTIRUN else None
        sweep = os.environ.get(SWEEP_VARIABLE, sweep)
        overrides = list(hydra_config.overrides.task)
        try:
            with refusing():
                spec, external = _prepare(config, run_dir, sweep)
        except Refused:
            _remove_if_empty(run_dir)
            raise
        spec = dataclasses.replace(spec, overrides=overrides)
        if external:
            return _train_external(spec, self._flag), True
        return self._train_here(spec), False

    def _check_folder(self, run_dir: Path, hydra_config: Any) -> None:
        """Whether the run has a folder of its own, and the command its working directory.

        Raises:
            Refused: it has not.
        """
        if run_dir in self._folders:
            raise Refused(
                f"the runs of a sweep must have directories of their own, but two share {run_dir}; sweep over values "
                "that differ, or set run.name"
            )
        self._folders.add(run_dir)
        # Hydra has gone into the run's folder already.
        os.chdir(hydra_config.runtime.cwd)
        try:
            check_chdir(hydra_config.job.chdir)
        except UserError:
            _remove_if_empty(run_dir)
            raise

    def _train_here(self, spec: RankSpec) -> Outcome:
        from regrow.trainer.hooks.startup import mark

        mark("config and checks")
        from regrow.launch.run.run_dir import own_run

        with own_run(spec.config, spec.run_dir) as ticket:
            clear_failures(spec.run_dir)
            spec = dataclasses.replace(spec, ticket=ticket)
            with refusing():
                opened = _open(spec)
            if opened.reached is not None:
                return _already_finished(spec, opened.reached)
            spec = dataclasses.replace(spec, record=opened.record)
            if spec.config.checkpoint.create_seed_checkpoint:
                from regrow.launch.run.seed import write_seed_checkpoint

                with refusing():
                    return write_seed_checkpoint(spec)
            if spec.layout.world_size > 1 or spec.config.launch.max_restarts > 0:
                from regrow.launch.run.local import run_local

                outcome = run_local(spec)
            else:
                try:
                    outcome = run_rank(spec, self._flag)
                finally:
                    self._flag.defer(deferring=False)
        log.info("%s at step %d: %s", outcome.kind, outcome.step, spec.run_dir)
        return outcome


class Refused(UserError):
    """Bad input found in preflight."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turns what a user can cause before training into the sentence for it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Refused(describe(error) or sentence_of(error)) from error
    except Exception as error:
        sentence = describe(error)
        if sentence is None:
            raise
        raise Refused(sentence) from error


def sentence_of(error: ValueError | OSError) -> str:
    """Without a number: of an operating system's own error, the path and the reason."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or type(error).__name__}; check that it is there and may be used"
    return str(error)


def _already_finished(spec: RankSpec, step: int) -> Outcome:
    log.info("finished already at step %d: %s; raise train.steps to go on", step, spec.run_dir)
    return Outcome(kind="finished", step=step)


def _remove_if_empty(run_dir: Path) -> None:
    """Hydra makes the folder before it asks us; a refused command leaves nothing behind."""
    try:
        run_dir.rmdir()
    except OSError:
        return


def _prepare(config: DictConfig, run_dir: Path, sweep: str | None) -> tuple[RankSpec, bool]:
    """All checks that need no process group, and the data. Also says whether ranks were started for us."""
    typed = to_config(config)
    from regrow.launch.run.preflight import (
        check_config,
        check_disk,
        check_launch,
        check_parallel,
        check_seed,
        prepare_data,
    )
    from regrow.launch.run.ranks import detect_ranks, export_ranks, forget_ranks
    from regrow.trainer.device import pick_device_type
    from regrow.trainer.parallel.layout import resolve_layout

    check_config(typed)
    if typed.checkpoint.create_seed_checkpoint:
        check_seed(os.environ)
        # One process writes it, whatever will train from it.
        typed.parallel, typed.launch.device = ParallelConfig(), Device.cpu
    device_type = pick_device_type(typed.launch.device.value)
    ranks = None if typed.checkpoint.create_seed_checkpoint else detect_ranks(os.environ, _degrees(typed))
    available = ranks.world_size if ranks is not None else _local_devices(device_type)
    layout = resolve_layout(typed.parallel, available, ranks_are_given=ranks is not None)
    check_parallel(typed, layout, device_type)
    check_launch(layout, device_type, ranks_are_given=ranks is not None)
    local_ranks = 1 if ranks is None else ranks.local_world_size
    typed.launch.threads_per_rank = threads_per_rank(
        typed.launch.threads_per_rank, os.environ, local_ranks=local_ranks
    )
    if ranks is not None:
        export_ranks(ranks)
    else:
        forget_ranks()
    with naming_fields(("run.root", run_dir)):
        check_disk(typed, run_dir)
    spec = RankSpec(
        config=typed,
        config_dict=to_dict(config),
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


def _open(spec: RankSpec) -> "OpenedRun":
    from regrow.launch.run.run_dir import open_run
    from regrow.trainer.data.token_store import TokenStore

    places = [
        ("run.root", spec.run_dir),
        ("checkpoint.initial_load_path", spec.config.checkpoint.initial_load_path),
        ("data.cache", spec.data_folder),
    ]
    with naming_fields(*places):
        store = TokenStore(spec.data_folder)
        return open_run(spec.config, spec.config_dict, spec.run_dir, store, overrides=spec.overrides)


def _train_external(spec: RankSpec, flag: StopFlag) -> Outcome:
    """A rank that torchrun or srun started: rank 0 opens the run, the others wait for its word."""
    from regrow.launch.run.rendezvous import share_from_rank_zero
    from regrow.launch.run.run_dir import own_run
    from regrow.trainer.run_record import RunRecord

    with ExitStack() as held:
        ticket: FencingToken | None = None

        def open_here() -> dict[str, Any]:
            nonlocal ticket
            ticket = held.enter_context(own_run(spec.config, spec.run_dir))
            clear_failures(spec.run_dir)
            with refusing():
                run = _open(spec)
            return {"reached": run.reached, "record": run.record.as_json()}

        opened = share_from_rank_zero(open_here, spec.config.launch.timeout_s)
        if isinstance(opened, str):
            raise Refused(opened)
        if opened["reached"] is not None:
            return _already_finished(spec, opened["reached"])
        record = RunRecord.from_json(opened["record"])
        try:
            # Rank 0 makes steps valid, and it is the one that holds the lease.
            return run_rank(dataclasses.replace(spec, ticket=ticket, record=record), flag)
        finally:
            flag.defer(deferring=False)
