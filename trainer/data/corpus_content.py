"""What identifies the content of a corpus' files, wherever they lie."""

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from regrow.trainer.data.cache import cache_folder, content_digest
from regrow.trainer.data.config import DataConfig
from regrow.trainer.data.corpus_files import reading
from regrow.trainer.data.corpus_paths import CorpusFile, LocalFile
from regrow.trainer.data.source import DataError, digest

__all__ = ["files_content"]

_CHUNK_BYTES = 1 << 20
# A name that an object has for its content alone, as S3 gives it to most.
_CONTENT_TAG = re.compile(r'"?[0-9a-f]{32}(-[0-9]+)?"?')


def files_content(files: Sequence[CorpusFile], config: DataConfig) -> str:
    """Identifies files by their bytes, in order; those behind URLs by what their places say of them.

    Raises:
        DataError: one cannot be read.
    """
    local = [f.path for f in files if isinstance(f, LocalFile)]
    remembered: Path | None = None
    with suppress(DataError):
        remembered = cache_folder(config) / "corpora"
    try:
        content = content_digest(local, remembered)
    except OSError as error:
        raise DataError(
            f"data.files must be files that can be read, but {error.filename} cannot "
            f"({error.strerror or error}); check it"
        ) from error
    if len(local) == len(files):
        return content
    return digest(content, *("" if isinstance(f, LocalFile) else _remote_content(f) for f in files))


def _remote_content(file: CorpusFile) -> str:
    """What identifies the content of a file behind a URL: the name that its place has for it, or its bytes."""
    if file.tag is None:
        return _hashed(file)
    # Any other name may mean something else at another place.
    return digest(file.tag, str(file.size()), *([] if _CONTENT_TAG.fullmatch(file.tag) else [file.name]))


def _hashed(file: CorpusFile) -> str:
    content = hashlib.blake2b(digest_size=16)
    with reading(file), file.open() as raw:
        while chunk := raw.read(_CHUNK_BYTES):
            content.update(chunk)
    return content.hexdigest()
