"""What can be wrong with a checkpoint that a user names or that lies in a run."""

from collections.abc import Sequence

__all__ = ["CheckpointError", "DamagedStepError", "LastSaveError", "OtherFormatError", "StepNotFoundError"]


class CheckpointError(ValueError):
    """A checkpoint cannot be used as asked; the message says why and what to do."""


class DamagedStepError(CheckpointError):
    """A step's files are not what its manifest says."""


class LastSaveError(CheckpointError):
    """What a run has come to could not be saved."""


class OtherFormatError(CheckpointError):
    """A step is of a format that this version does not read: it may be sound, and is left where it is."""


class StepNotFoundError(CheckpointError, FileNotFoundError):
    """The step asked for is not there."""

    def __init__(
        self, step: int, available: Sequence[int], folder: str, setting: str = "checkpoint.load_step"
    ) -> None:
        there = ", ".join(str(s) for s in available) or "none"
        remedy = "choose one of these" + (" or -1 for the newest" if setting == "checkpoint.load_step" else "")
        super().__init__(f"{setting} must be one of the steps in {folder} ({there}), but is {step}; {remedy}")
        self._given = (step, tuple(available), folder, setting)

    def __reduce__(self) -> tuple[type["StepNotFoundError"], tuple[object, ...]]:
        # An error travels between ranks by what it was made of.
        return type(self), self._given
