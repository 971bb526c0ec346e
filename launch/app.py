"""The command: what happens between Hydra's config and the run."""

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from regrow.launch.config.early_checks import check_complete, check_overrides, composing_once
from regrow.launch.config.errors import (
    UserError,
    check_arguments,
    check_chdir,
    describe,
    describe_run_folder,
)
from regrow.launch.config.overrides import is_multirun, swept_keys
from regrow.launch.config.package_configs import register_packages
from regrow.launch.config.package_schemas import find_and_load
from regrow.launch.config.plugins import UserPackages
from regrow.launch.config.refusals import Refused
from regrow.launch.config.run_name import register_resolver
from regrow.launch.config.schema import Mode, register_schemas
from regrow.launch.exit_code import ExitCode, gravest
from regrow.launch.run.failures import RankFailed, first_failure
from regrow.launch.run.logs import log_to_console
from regrow.launch.run.rank_spec import Outcome
from regrow.launch.run.signals import STOP_NOTE_VARIABLE, StopFlag
from regrow.launch.sweep.status import RunFailed, result_of
from regrow.launch.sweep.submitit import stay_until_killed
from regrow.trainer.process import importing, interrupted_by

__all__ = ["Application", "run_command"]

log = logging.getLogger(__name__)

# Set by launchers that start a sweep's runs one by one.
SWEEP_VARIABLE = "REGROW_SWEEP"


def run_command(arguments: list[str], flag: StopFlag) -> int:
    """`regrow` with its arguments; returns the exit code.

    Args:
        arguments: the command line.
        flag: the process' signal handler.
    """
    full_error = "HYDRA_FULL_ERROR" in os.environ
    # Hydra prints and exits by itself unless this is set; errors are ours to explain.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    app = Application(flag, full_error=full_error)
    try:
        app.run(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else ExitCode.bad_input
    except Exception as error:
        sentence = describe(error)
        if sentence is None or full_error:
            traceback.print_exc()
        if sentence is None:
            return ExitCode.failed
        print(f"error: {sentence}", file=sys.stderr)
        return ExitCode.bad_input
    finally:
        if not full_error:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    return app.exit_code()


@contextmanager
def _launchers(arguments: Sequence[str]) -> Iterator[None]:
    """Has Hydra know our launchers where one is chosen, and ends the processes that one leaves."""
    if not any(a.startswith("hydra/launcher=") for a in arguments):
        yield
        return
    # joblib, which most commands do not need, takes a fifth of a second to import.
    from regrow.launch.sweep.launchers import register_launchers, stop_joblib

    register_launchers()
    try:
        yield
    finally:
        if any(a.startswith("hydra/launcher=joblib") for a in arguments):
            stop_joblib()


def _arguments_for_hydra(arguments: Sequence[str], *, multirun: bool) -> list[str]:
    """argparse takes overrides on one side of a flag only, and a sweep must be said to be one."""
    flags = [a for a in arguments if a in ("-m", "--multirun")]
    if multirun and not flags:
        flags = ["--multirun"]
    return [*flags[:1], *(a for a in arguments if a not in ("-m", "--multirun"))]


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
        self._packages = find_and_load()
        check_arguments(arguments)
        check_overrides(arguments)
        register_packages(self._packages)
        self._swept = swept_keys(arguments)
        register_resolver(self._swept)
        showing = any(a.startswith(("--info", "--cfg", "--hydra-help")) for a in arguments)
        if not showing:
            # Hydra prints these itself, through loggers that would reach our console a second time.
            log_to_console()
        if "mode=plan" in arguments:
            # Hydra makes the folders of what it starts.
            arguments = [*arguments, "hydra.run.dir=.", "hydra.sweep.dir=.", "hydra.sweep.subdir=."]
        sys.argv[1:] = _arguments_for_hydra(arguments, multirun=is_multirun(arguments) and not showing)
        try:
            with _launchers(arguments), composing_once():
                hydra.main(config_path="pkg://regrow.conf", config_name="config", version_base="1.3")(self._task)()
        except RunFailed as error:
            print(f"error: {error}", file=sys.stderr)
            self._codes.append(error.exit_code)
        except HydraException:
            raise
        except OSError as error:
            # Those of a run itself never come here.
            raise UserError(describe_run_folder(error, arguments)) from error

    def exit_code(self) -> ExitCode:
        """That of the run, or the gravest of the sweep's."""
        return gravest(self._codes)

    def _task(self, config: DictConfig) -> float | None:
        """One run; returns its result, for sweepers that optimise."""
        if ExitCode.resumable in self._codes:
            return None  # a sweep that was asked to stop starts no further run
        if config.mode is Mode.plan:
            self._plan(config)
            return None
        away = os.getpid() != self._home
        if away:
            self._flag.install()
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        self._run_once(config)
        if away and self._codes[-1]:
            raise RunFailed(f"{run_dir.name} ended with exit code {self._codes[-1]}", exit_code=self._codes[-1])
        return result_of(run_dir)

    def _plan(self, config: DictConfig) -> None:
        """Says what a run will need. A folder that Hydra made for it is removed."""
        with importing():
            # torch takes seconds to import, and what shows or refuses a command needs none.
            from regrow.launch.run.plan import plan_config

        folder = Path(HydraConfig.get().runtime.output_dir)
        os.chdir(HydraConfig.get().runtime.cwd)
        try:
            print(plan_config(config))
            self._codes.append(ExitCode.done)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            self._codes.append(ExitCode.bad_input)
        finally:
            if folder != Path.cwd():
                with suppress(OSError):
                    folder.rmdir()

    def _run_once(self, config: DictConfig) -> None:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        try:
            outcome, given_ranks = self._train(config, run_dir)
            if outcome.message:
                print(f"error: {outcome.message}", file=sys.stderr)
            # An elastic agent would start again what ends with anything but 0, and srun would kill the ranks that are
            # a moment slower; the stop record tells the rest.
            recorded = given_ranks and ("TORCHELASTIC_RUN_ID" in os.environ or STOP_NOTE_VARIABLE in os.environ)
            self._codes.append(ExitCode.done if recorded else outcome.exit_code)
            if "SUBMITIT_EXECUTOR" in os.environ and outcome.exit_code == ExitCode.resumable:
                stay_until_killed(requeue=outcome.kind == "preempted")
        except UserError as error:
            if self._full_error:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            self._codes.append(ExitCode.bad_input)
        except RankFailed as error:
            # Another rank may have failed before this one, which then saw it go.
            print(f"error: {first_failure(run_dir) or error}", file=sys.stderr)
            self._codes.append(error.exit_code)
        except Exception as error:
            if (stop := interrupted_by(error)) is not None:
                raise stop from None
            traceback.print_exc()
            failure = first_failure(run_dir)
            if failure is not None:
                # Of several ranks the one that failed first says why; the others saw it go.
                print(f"error: {failure}", file=sys.stderr)
            self._codes.append(ExitCode.failed)

    def _train(self, config: DictConfig, run_dir: Path) -> tuple[Outcome, bool]:
        hydra_config = HydraConfig.get()
        self._check(config, run_dir, hydra_config)
        sweep = Path(config.run.root).name if hydra_config.mode is RunMode.MULTIRUN else None
        with importing():
            # torch takes seconds to import, and what shows or refuses a command needs none.
            from regrow.launch.run.start import run_config

        return run_config(
            config,
            run_dir,
            overrides=list(hydra_config.overrides.task),
            sweep=os.environ.get(SWEEP_VARIABLE, sweep),
            flag=self._flag,
        )

    def _check(self, config: DictConfig, run_dir: Path, hydra_config: Any) -> None:
        """Whether the run has a folder of its own, the command its working directory, and each field a value.

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
            check_chdir(chdir=hydra_config.job.chdir)
            check_complete(config)
        except UserError:
            with suppress(OSError):
                run_dir.rmdir()
            raise
