"""Folders that Hugging Face's `datasets` saved: which files hold their rows."""

from collections.abc import Callable
from typing import Annotated

from msgspec import Meta, Struct, field

from regrow.checkpoint.documents import DocumentError, FileName, read_document
from regrow.trainer.data.source import DataError, shown

__all__ = ["SMALL_BYTES", "saved_files"]

# Of the documents beside the rows.
SMALL_BYTES = 16 << 20
_STATE = "state.json"
_SPLITS = "dataset_dict.json"


class _DataFile(Struct, frozen=True):
    filename: FileName


class _State(Struct, frozen=True):
    """`state.json`, as `Dataset.save_to_disk` writes it."""

    data_files: Annotated[list[_DataFile], Meta(max_length=100_000)] = field(name="_data_files")
    # Versions before 2.0 kept a selection of rows beside them.
    indices: list[_DataFile] | None = field(name="_indices_data_files", default=None)


class _Splits(Struct, frozen=True):
    """`dataset_dict.json`, as `DatasetDict.save_to_disk` writes it."""

    splits: Annotated[list[FileName], Meta(max_length=1000)]


def saved_files(folder: str, read: Callable[[str], bytes]) -> list[str]:
    """The names of a saved dataset's files of rows, in their order; empty for any other folder.

    Args:
        folder: for messages.
        read: gives the bytes of a small file of the folder by its name.

    Raises:
        DataError: it is a saved dataset that cannot be used as one corpus.
    """
    try:
        body = _read_if_there(read, _STATE)
        if body is None:
            splits = _read_if_there(read, _SPLITS)
            if splits is not None:
                raise _several(folder, read_document(splits, _Splits).splits)
            return []
        state = read_document(body, _State)
    except DocumentError as error:
        raise DataError(
            f"data.files must name a whole dataset where it names a folder, but that in {folder} cannot be read "
            f"({shown(str(error))}); save it again"
        ) from None
    if state.indices:
        raise DataError(
            f"data.files must name datasets whose rows are all used, but {folder} has a selection of rows beside it "
            "(_indices_data_files); save it with a newer version of datasets, or after flatten_indices()"
        )
    for item in state.data_files:
        if not item.filename.endswith(".arrow"):
            raise DataError(
                f"data.files must name datasets of .arrow files, but {folder}/{_STATE} names {shown(item.filename)}; "
                "save it again"
            )
    if not state.data_files:
        raise DataError(f"data.files must name datasets that have rows, but {folder} has no file of them; check it")
    return [item.filename for item in state.data_files]


def _several(folder: str, splits: list[str]) -> DataError:
    example = f"{folder}/{splits[0]}" if splits else f"{folder}/train"
    return DataError(
        f"data.files must name one dataset, but {folder} holds several ({shown(', '.join(splits))}); use for "
        f"instance {example}"
    )


def _read_if_there(read: Callable[[str], bytes], name: str) -> bytes | None:
    try:
        return read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(
            f"data.files must be files that can be read, but {error.filename or name} cannot "
            f"({error.strerror or error}); check it"
        ) from error
