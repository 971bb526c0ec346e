"""One rank: from a spec to a trained model and a stop record.

Run as `python -m regrow.launch.run.worker SPEC` by the local launcher; `run_rank` is also called in the launcher's
own process where there is one rank, and by ranks that torchrun or srun started.
"""

import logging
import os
import pickle
import platform
import sys
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.launch.run.signals import StopFlag
from regrow.trainer.process import PARENT_VARIABLE, die_with_parent

if TYPE_CHECKING:
    from regrow.checkpoint.run.lease import FencingToken
    from regrow.launch.config.schema import Config
    from regrow.models.base import LanguageModel
    from regrow.trainer.loop import StopReason, Trainer
    from regrow.trainer.parallel.context import ParallelContext
    from regrow.trainer.parallel.layout import Layout
    from regrow.trainer.run_record import RunRecord

__all__ = ["Outcome", "RankSpec", "read_outcome", "run_rank"]

log = logging.getLogger(__name__)
OUTCOME = "stop.json"
# Beside the spec: the signal that the launcher was stopped by.
STOP_NOTE = "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSpec:
    """What every rank of a run is told.

    Attributes:
        config: typed.
        config_dict: the same as plain values.
        layout: the degrees.
        device_type: `cpu` or `cuda`.
        run_dir: the run's directory.
        data_folder: the token store.
        sweep: the sweep's name, if any.
        overrides: the command line.
        record: the run's, as this start makes it; None until the run is opened.
        ticket: of the lease that the launcher holds for this run.
    """

    config: "Config"
    config_dict: dict[str, Any]
    layout: "Layout"
    device_type: str
    run_dir: Path
    data_folder: Path
    sweep: str | None
    overrides: list[str] = field(default_factory=list)
    record: "RunRecord | None" = None
    ticket: "FencingToken | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run's ranks ended; the stop record.

    Attributes:
        kind: `finished`, `terminated`, `preempted`, `refused` (the state cannot be loaded as asked; nothing was
            changed) or `failed`.
        step: reached.
        message: of the failure.
    """

    kind: str
    step: int
    message: str = ""

    @property
    def exit_code(self) -> int:
        """0 done, 2 bad input, 3 resumable stop, 1 anything else."""
        return {"finished": 0, "refused": 2, "terminated": 3, "preempted": 3}.get(self.kind, 1)


def read_outcome(run_dir: Path) -> Outcome | None:
    """The stop record, None where the ranks left none that can be read."""
    from regrow.checkpoint.documents import DocumentError, read_document
    from regrow.checkpoint.files import read_regular

    try:
        return read_document(read_regular(run_dir / OUTCOME), Outcome)
    except (DocumentError, OSError):
        return None


def log_to_files(run_dir: Path, rank: int, *, console: bool) -> logging.Handler:
    """Sends this rank's log to `logs/rank-N.log`, and to the terminal where asked."""
    if console:
        log_to_console()
    path = run_dir / "logs" / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = LogFile(path)
    except OSError as error:
        log.warning("%s cannot be written (%s); this rank goes on without it", path, error.strerror or error)
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


class LogFile(logging.FileHandler):
    """A log whose disk may be full: that is said once on the terminal, and a traceback for each line helps nobody."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._behind = False

    def _open(self) -> TextIOWrapper:
        # A named pipe would keep this rank waiting for a reader.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        return os.fdopen(os.open(self.baseFilename, flags, 0o644), "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._behind:
            self._behind = True
            sys.stderr.write(f"{self.baseFilename} cannot be written ({error.strerror}); it will miss lines\n")

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # lines that the disk did not take
            self._behind = True


class ConsoleHandler(logging.Handler):
    """Writes to what standard error is at that moment: a progress bar puts itself in its place, below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def log_to_console() -> None:
    """Plain lines on standard error, once."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    if not any(isinstance(h, ConsoleHandler) for h in root.handlers):
        console = ConsoleHandler()
        console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(console)
    # torch's own launcher reports every child's end as a warning; the stop record says it better.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


def build_trainer(spec: RankSpec, context: "ParallelContext", flag: StopFlag, threads: int) -> "Trainer":
    """Everything that this rank trains with."""
    import torch

    from regrow.launch.run.build import build_model, build_schedule
    from regrow.models.config import DecoderConfig
    from regrow.trainer.data.loader import Prefetcher
    from regrow.trainer.data.token_store import TokenStore
    from regrow.trainer.data.tokenizer import load_tokenizer
    from regrow.trainer.data.windows import Windows
    from regrow.trainer.device import seed_everything
    from regrow.trainer.loop import Resources, Trainer, TrainerOptions
    from regrow.trainer.parallel.apply import initialise, parallelise
    from regrow.trainer.parallel.engine import Engine
    from regrow.trainer.state import TrainState

    config, data = spec.config, spec.config.data
    seed_everything(config.seed)
    if config.train.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, set before it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    model_config = config.model
    assert isinstance(model_config, DecoderConfig), "the launcher refuses other models"
    with torch.device("meta"):
        whole = build_model(config)
    _choose_kernels(spec, whole, context)
    parallel = parallelise(
        whole,
        context,
        model_config=model_config,
        parallel=config.parallel,
        train=config.train,
        precision=config.precision.name,
        sequences=data.global_batch_size,
    )
    initialise(parallel, context.device, config.seed, data.seq_len)
    engine = Engine(
        parallel,
        context,
        model_config=model_config,
        schedule=config.parallel.pp_schedule,
        precision=config.precision.name,
    )
    store = TokenStore(spec.data_folder)
    train, validation = (Windows(store, data.seq_len, data.validation_fraction, validation=v) for v in (False, True))

    def make_batches(samples_consumed: int) -> Prefetcher:
        return Prefetcher(
            train,
            seed=config.seed,
            samples_consumed=samples_consumed,
            global_batch_size=data.global_batch_size,
            rank=context.data_rank,
            ranks=context.layout.data_ranks,
            micro_batch_size=data.micro_batch_size,
            document_mask=data.document_mask,
            depth=data.prefetch,
        )

    from regrow.launch.run.build import build_optimizer_class

    return Trainer(
        options=TrainerOptions(
            seed=config.seed,
            steps=config.train.steps,
            lr=config.optimizer.lr,
            grad_clip=config.train.grad_clip,
            global_batch_size=data.global_batch_size,
            seq_len=data.seq_len,
        ),
        resources=Resources(
            run_dir=spec.run_dir,
            tokenizer=load_tokenizer(store.tokenizer_file),
            validation=validation,
            micro_batch_size=data.micro_batch_size,
            document_mask=data.document_mask,
        ),
        context=context,
        engine=engine,
        optimizer=build_optimizer_class(config)(config.optimizer, parallel.model),
        schedule=build_schedule(config),
        make_batches=make_batches,
        hooks=_hooks(spec, context, threads, store.index.fingerprint),
        state=TrainState(schedule_total=config.scheduler.total_steps or config.train.steps),
        stop_requested=_StopRequest(flag, compiles=config.train.compile),
    )


def _choose_kernels(spec: RankSpec, whole: "LanguageModel", context: "ParallelContext") -> None:
    """Says what a CPU computes with; layouts that cut sequences or matrices, and float64, are there to be checked."""
    import torch

    from regrow.launch.config.schema import Kernels
    from regrow.models.kernels import cases_of
    from regrow.trainer.config import PrecisionName
    from regrow.trainer.kernels import choose_kernels, use_plain_operators

    config, layout = spec.config, context.layout
    cut, name = layout.tp * layout.cp > 1, config.precision.name
    plain = config.launch.kernels is Kernels.plain or config.train.compile or name is PrecisionName.fp64
    if plain or cut or context.device.type != "cpu":
        use_plain_operators()
        return
    rows = min(config.data.micro_batch_size, -(-config.data.global_batch_size // layout.data_ranks))
    dtype = torch.bfloat16 if name is PrecisionName.bf16 else torch.float32
    choose_kernels(cases_of(whole, rows, config.data.seq_len, dtype), context, spec.run_dir)


class _StopRequest:
    """This rank's wish to stop. Before the first step nothing would be lost, so until the loop first asks a signal
    ends the rank at once, and where that step compiles, until it has.

    Args:
        flag: the signal handler.
        compiles: whether the first step may take minutes.
    """

    def __init__(self, flag: StopFlag, *, compiles: bool) -> None:
        self._flag = flag
        self._early = 1 if compiles else 0

    def __call__(self) -> "StopReason | None":
        if self._early == 0:
            self._flag.defer(deferring=True)
        self._early = max(0, self._early - 1)
        return _reason(self._flag)


def _reason(flag: StopFlag) -> "StopReason | None":
    import signal

    from regrow.trainer.loop import StopReason

    if flag.received is None:
        return None
    return StopReason.preempted if flag.received == signal.SIGUSR2 else StopReason.terminated


def _hooks(spec: RankSpec, context: "ParallelContext", threads: int, fingerprint: str) -> list[Any]:
    """All hooks in the order in which they run; the checkpoint is last, when the step's rows are written."""
    from regrow.launch.run.build import build_hooks, uses_wandb
    from regrow.trainer.hook import Hook
    from regrow.trainer.hooks.begin import BeginHook
    from regrow.trainer.hooks.metrics import MetricsHook, SamplesHook
    from regrow.trainer.hooks.progress import ProgressHook
    from regrow.trainer.hooks.record import RecordHook
    from regrow.trainer.hooks.startup import StartupHook

    config = spec.config
    hooks: list[Hook] = [BeginHook(partial(_begin, spec)), *build_hooks(config), MetricsHook()]
    if config.data.log_samples:
        hooks.append(SamplesHook())
    hooks.append(ProgressHook(config.train.log_every))
    if uses_wandb(config):
        from regrow.trainer.hooks.wandb import WandbHook

        hooks.append(WandbHook(config.wandb, config.run.name, spec.config_dict, spec.sweep))
    hooks.append(RecordHook(_attempt(context, threads)))
    if config.checkpoint.enable:
        hooks += _checkpoint_hooks(spec, fingerprint)
    hooks.append(StartupHook())
    if context.is_main:
        log.info("hooks, in order: %s", ", ".join(type(h).__name__ for h in hooks))
    return hooks


def _begin(spec: RankSpec) -> None:
    """Writes what this start changes in the run.

    Raises:
        LeaseLostError: another launcher has taken the run over meanwhile.
    """
    from regrow.launch.run.run_dir import begin_run, lease_place
    from regrow.trainer.data.token_store import TokenStore

    assert spec.record is not None, "the launcher opens the run before any rank starts"
    if spec.ticket is not None:
        spec.ticket.check_not_taken(lease_place(spec.config, spec.run_dir))
    begin_run(spec.config_dict, spec.run_dir, TokenStore(spec.data_folder), spec.overrides, spec.record)


def run_labels(spec: RankSpec, fingerprint: str) -> dict[str, Any]:
    """What each of a run's manifests says of the run.

    Args:
        spec: of the run.
        fingerprint: of its data.
    """
    from regrow.launch.config.identity import config_hash

    assert spec.record is not None, "the launcher opens the run before any rank starts"
    # Options for a storage may be credentials.
    checkpoint = {k: v for k, v in spec.config_dict["checkpoint"].items() if k != "storage_options"}
    return {
        "data_fingerprint": fingerprint,
        "config_hash": config_hash(spec.config_dict),
        "model": spec.config_dict["model"],
        "versions": software_versions(),
        "run_id": spec.record.run_id,
        "config": {**spec.config_dict, "checkpoint": checkpoint},
        "lineages": tuple(spec.record.lineages),
    }


def _attempt(context: "ParallelContext", threads: int) -> Any:
    from regrow.trainer.run_record import Attempt

    return Attempt(
        job=os.environ.get("SLURM_JOB_ID"),
        host=platform.node(),
        layout=context.layout.as_dict(),
        threads=threads,
        versions=software_versions(),
    )


def software_versions() -> dict[str, str]:
    """What a run or a checkpoint was made with."""
    import torch

    from regrow.launch.run.versions import own_version

    versions = {"regrow": own_version(), "torch": str(torch.__version__), "python": platform.python_version()}
    revision = _git_revision()
    return {**versions, "git": revision} if revision else versions


def _git_revision() -> str | None:
    """Of the sources that run, None where they are not a checkout."""
    import subprocess

    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _checkpoint_hooks(spec: RankSpec, fingerprint: str) -> list[Any]:
    import torch

    from regrow.checkpoint.load.initial_load import LoadRules
    from regrow.checkpoint.save.saver import SaverOptions
    from regrow.launch.run.build import (
        checkpoint_folder,
        export_folder,
        hf_export,
        open_initial,
        policies,
        rules,
        tracked_metrics,
    )
    from regrow.launch.run.weights import shapes_of, vocabulary_of
    from regrow.trainer.hooks.checkpoint import CheckpointHook, CheckpointPlan
    from regrow.trainer.hooks.export import ExportHook, ExportPlan
    from regrow.trainer.hooks.last_save import LastSave

    config, record = spec.config, spec.record
    assert record is not None, "the launcher opens the run before any rank starts"
    options, folder = config.checkpoint, checkpoint_folder(config, spec.run_dir)
    hooks: list[Any] = []
    if options.export.every_n and policies(options):
        hooks.append(
            ExportHook(
                ExportPlan(
                    every_n=options.export.every_n,
                    checkpoints=folder,
                    folder=export_folder(spec.run_dir),
                    export=hf_export(config, spec.run_dir),
                    lineages=record.lineages,
                )
            )
        )
    plan = CheckpointPlan(
        folder=folder,
        policies=policies(options),
        storage_options=options.storage_options,
        rules=rules(options),
        lineages=record.lineages,
        tracked=tracked_metrics(options),
        schedule_total=config.scheduler.total_steps,
        stretched=record.stretched(),
        labels=run_labels(spec, fingerprint),
        mode=options.async_mode,
        saver=SaverOptions(
            files_per_rank=options.files_per_rank,
            commit_timeout_s=options.commit_timeout_s,
            ticket=spec.ticket,
        ),
        when_busy=options.when_busy,
        reader_timeout_s=options.lease_timeout_s,
        stop_on_error=options.on_save_error.value == "stop",
        max_failures=options.max_save_errors,
        grace_s=float(os.environ.get("REGROW_GRACE_S", "inf")),
        last=LastSave(
            model_only=options.last_save_model_only,
            dtype=getattr(torch, options.export_dtype.name),
            export=hf_export(config, spec.run_dir) if options.last_save_in_hf else None,
            folder=export_folder(spec.run_dir),
        ),
        initial=LoadRules.from_config(options, vocabulary_of(config.model)),
        open_initial=lambda path: open_initial(config, path).source,
        parameters=lambda: shapes_of(config.model).keys(),
    )
    return [*hooks, CheckpointHook(plan)]


def run_rank(spec: RankSpec, flag: StopFlag) -> Outcome:
    """Trains on this rank; rank 0 leaves the stop record. Joins and leaves the process groups.

    Errors that would repeat themselves (a loss that is not finite, a step that cannot be loaded, saves that fail)
    become an outcome, so that nobody restarts them; any other error is raised.
    """
    from regrow.launch.run.failures import RankFailed, clear_failures, note_failure, saw_another_go, storage_problem
    from regrow.launch.run.run_dir import share_run
    from regrow.trainer.device import pin_threads
    from regrow.trainer.hooks.startup import mark
    from regrow.trainer.parallel.context import close_parallel, open_parallel

    rank, local_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    handler = log_to_files(spec.run_dir, rank, console=rank == 0)
    # Of a start before this one, where torchrun starts the ranks again.
    clear_failures(spec.run_dir, rank)
    threads = pin_threads(spec.config.launch.threads_per_rank, local_ranks)
    trainer: Trainer | None = None
    try:
        with share_run(spec.run_dir):
            mark("interpreter and imports")
            context = open_parallel(spec.layout, spec.device_type, spec.config.launch.timeout_s)
            mark("process groups")
            trainer = build_trainer(spec, context, flag, threads)
            mark("model and data")
            outcome = _fit(spec, rank, trainer)
            if rank == 0:
                _leave_outcome(spec.run_dir, outcome)
            return outcome
    except Exception as error:
        problem = storage_problem(error)
        if problem is None and saw_another_go(spec.run_dir, rank, error):
            log.info("rank %d ends, because another one has failed", rank)
            raise RankFailed(str(error), 1) from None
        note_failure(spec.run_dir, rank, error if problem is None else ValueError(problem))
        if problem is None:
            log.exception("rank %d failed", rank)
            raise
        begun = trainer is not None and trainer.batch is not None
        outcome = Outcome(kind="failed" if begun else "refused", step=_step_of(trainer), message=problem)
        if rank == 0:
            _leave_outcome(spec.run_dir, outcome)
        if spec.layout.world_size > 1:
            # The other ranks know nothing of it, and would wait for this one.
            raise RankFailed(problem, outcome.exit_code) from None
        return outcome
    finally:
        close_parallel()
        logging.getLogger().removeHandler(handler)
        handler.close()


def _fit(spec: RankSpec, rank: int, trainer: "Trainer") -> Outcome:
    """Trains; what ends all ranks alike is an outcome."""
    from regrow.checkpoint.errors import CheckpointError, LastSaveError
    from regrow.checkpoint.run.lease import LeaseLostError
    from regrow.launch.run.failures import note_failure
    from regrow.trainer.loop import NonFiniteLossError

    try:
        result = trainer.fit()
        return Outcome(kind=result.reason.value, step=result.step)
    except (NonFiniteLossError, CheckpointError) as error:
        note_failure(spec.run_dir, rank, error)
        begun = NonFiniteLossError | LeaseLostError | LastSaveError
        before = trainer.batch is None and not isinstance(error, begun)
        kind, step = ("refused", 0) if before else ("failed", trainer.state.step)
        return Outcome(kind=kind, step=step, message=str(error))


def _step_of(trainer: "Trainer | None") -> int:
    return 0 if trainer is None or trainer.batch is None else trainer.state.step


def _leave_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Writes the stop record; the run's end is what it is where that fails."""
    from regrow.checkpoint.files import write_json

    try:
        write_json(run_dir / OUTCOME, {"kind": outcome.kind, "step": outcome.step, "message": outcome.message})
    except OSError as error:
        log.warning("%s cannot be written (%s)", run_dir / OUTCOME, error.strerror or error)


def main() -> None:
    """The local launcher's child."""
    flag = StopFlag()
    flag.install()
    flag.defer(deferring=True)
    # A signal that came before these handlers stood is written down by the launcher.
    noted = Path(sys.argv[1]).with_name(STOP_NOTE)
    if noted.exists():
        flag.received = int(noted.read_text())
    if PARENT_VARIABLE in os.environ:
        die_with_parent(int(os.environ[PARENT_VARIABLE]))
    # The terminal sends Ctrl-C to the launcher too, which passes it on as TERM.
    import signal

    from regrow.launch.run.failures import RankFailed

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Path(sys.argv[1]).open("rb") as file:
        spec: RankSpec = pickle.load(file)
    code = 0
    try:
        run_rank(spec, flag)
    except RankFailed:
        code = 1  # the launcher reads why
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of asynchronous collectives can abort the interpreter's ordinary shutdown.
    os._exit(code)


if __name__ == "__main__":
    main()
