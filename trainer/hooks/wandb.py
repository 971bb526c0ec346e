"""Weights & Biases. The only file that imports wandb."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from regrow.errors import ConfigError
from regrow.trainer.config import WandbConfig, WandbMode
from regrow.trainer.hooks.config import WandbHookConfig
from regrow.trainer.hooks.log_records import read_log_records
from regrow.trainer.hooks.logger import LoggedRun, LoggerHook, RunEnd, Store, measured
from regrow.trainer.hooks.user_project import read_user_project
from regrow.trainer.jsonlines import RowTail
from regrow.trainer.run_files import GENERATED, GENERATED_LAST

if TYPE_CHECKING:
    pass

__all__ = ["WandbHook"]

_STEP = "train/global_step"


@final
class WandbHook(LoggerHook):
    """See `WandbConfig`. One W&B run for the whole life of a lineage."""

    NAME = "wandb"
    TITLE = "W&B"
    PACKAGES = ("wandb",)

    def __init__(self, config: WandbHookConfig) -> None:
        super().__init__()
        self._config = config.settings
        if self._config.diff_bytes < 0:
            raise ConfigError(
                f"wandb.diff_bytes must be at least 0, but is {self._config.diff_bytes}; use 0 to send no changes"
            )

    def open_store(self, run: LoggedRun) -> Store:
        """The run, which W&B continues where it has it."""
        return _WandbRun(self._config, run)


@final
class _WandbRun(Store):
    """A run of W&B's. Offline it is files below the run's directory, one for each start."""

    def __init__(self, config: WandbConfig, run: LoggedRun) -> None:
        import wandb

        self._config, self._logged = config, run
        offline = config.mode is WandbMode.offline
        # Before W&B begins the file of this start.
        self._last = _last_step_of_files(run) if offline else 0
        self._run: wandb.Run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or run.sweep or (run.run_name if run.line.branch else None),
            tags=list(config.tags),
            mode=config.mode.value,
            id=run.key,
            name=run.name,
            config=run.config,
            dir=str(run.run_dir),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        if config.mode is WandbMode.online:
            summary: Any = self._run.summary
            self._last = int(summary.get(_STEP) or 0)
        self._run.define_metric(_STEP)
        # Each row brings its step; with what comes at the end, none is to stand a second time.
        self._run.define_metric("*", step_metric=_STEP, step_sync=False)
        self._note_project()
        self._samples = RowTail(run.run_dir / GENERATED)
        self._texts: dict[int, list[str]] = {}

    def _note_project(self) -> None:
        """The user's own repository, of which the changes become a file of the run."""
        project = read_user_project(Path.cwd(), self._config.diff_bytes)
        line = self._logged.line
        about = {"lineage": line.lineage, "from_step": line.from_step, "run_id": self._logged.run_id}
        if project is not None:
            about |= {"git": project.revision, "uncommitted": bool(project.diff), "diff_is_cut": project.is_cut}
            if project.diff:
                path = Path(self._run.dir) / "uncommitted.diff"
                path.write_text(project.diff)
                self._run.save(str(path), base_path=self._run.dir, policy="now")
        config: Any = self._run.config
        config.update({"regrow": about}, allow_val_change=True)

    def last_step(self) -> int:
        return self._last

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        self._read_samples(rows[0]["step"])
        for row in rows:
            values: dict[str, Any] = {f"train/{name}": value for name, value in measured(row).items()}
            if texts := self._texts.pop(row["step"], []):
                values["samples"] = wandb.Table(
                    columns=["step", "text"], data=[[row["step"], text] for text in texts]
                )
            self._run.log({_STEP: row["step"], **values})

    def _read_samples(self, first: int) -> None:
        """The texts that come with the next rows; they are written down before the row of their step is."""
        while self._config.samples and (found := self._samples.read()):
            self._texts |= {row["step"]: row["texts"] for row in found if row["step"] >= first}

    def note_commit(self, step: int, place: str) -> None:
        import wandb

        if not self._config.artifacts:
            return
        artifact = wandb.Artifact(f"{self._run.name}-checkpoint", type="model", metadata={"step": step})
        # A reference: neither read nor sent.
        artifact.add_reference(place if "://" in place else Path(place).absolute().as_uri(), checksum=False)
        self._run.log_artifact(artifact, aliases=[f"step-{step}"])

    def close(self, end: RunEnd | None) -> None:
        if end is not None and end.kind == "finished":
            self._run.log(self._last_media(end.step))
        if end is not None and end.kind in ("failed", "preempted") and self._config.alerts:
            title = f"{self._logged.name} {'failed' if end.kind == 'failed' else 'was preempted'}"
            self._run.alert(title=title, text=f"at step {end.step}: {end.error or 'it goes on from its last save'}")
        self._run.finish(exit_code=int(end is not None and end.kind == "failed"))

    def _last_media(self, step: int) -> dict[str, Any]:
        """The texts generated at the end, and the picture of the loss."""
        import wandb

        # matplotlib takes a second too.
        from regrow.trainer.hooks.plot import plot_loss

        media: dict[str, Any] = {}
        run_dir = self._logged.run_dir
        generated = run_dir / GENERATED_LAST
        if self._config.samples and generated.is_file():
            text = generated.read_text()
            media["samples/last"] = wandb.Table(columns=["step", "text"], data=[[step, text]])
        if self._config.picture:
            media["loss"] = wandb.Image(str(plot_loss(run_dir)))
        return media


def _last_step_of_files(run: LoggedRun) -> int:
    """The last step that W&B has in the files of earlier starts, or had when they were whole.

    Files may be sent and then removed, of which the note tells that was made when the run was closed in order.
    """
    from wandb.proto import wandb_internal_pb2

    record_type: Any = getattr(wandb_internal_pb2, "Record")  # noqa: B009 (generated at import)
    last = run.line.step
    for file in run.run_dir.glob(f"wandb/offline-run-*-{run.key}/run-{run.key}.wandb"):
        for body in read_log_records(file):
            record = record_type.FromString(body)
            for item in record.history.item:
                if _STEP in (item.key, *item.nested_key):
                    last = max(last, int(json.loads(item.value_json)))
    return last
