"""Text files: .txt, .jsonl (plain, .gz, .zst) and .parquet."""

import os
from collections.abc import Iterator
from contextlib import suppress
from glob import escape, glob
from pathlib import Path
from typing import final

from regrow.trainer.data.cache import cache_folder, content_digest
from regrow.trainer.data.config import TextConfig
from regrow.trainer.data.corpus_files import check_regular, read_json_lines, read_text, reading
from regrow.trainer.data.source import CorpusPart, CorpusSource, DataError, Notes, digest

__all__ = ["TextSource"]

_UNIT_BYTES = 64 << 20
_ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@final
class TextSource(CorpusSource):
    """See `TextConfig`."""

    config: TextConfig

    def check(self) -> None:
        if not self.config.files:
            raise DataError("data.files must name at least one file or glob, but is []; use data.files=[a.txt]")
        for path in self._paths():
            if not path.name.endswith(_ENDINGS):
                raise DataError(
                    f"data.files must end in one of {', '.join(_ENDINGS)}, but holds {path}; convert it first"
                )
            with reading(path):
                check_regular(path)
        if self.config.txt_document_bytes < 0:
            raise DataError(
                f"data.txt_document_bytes must be at least 0, but is {self.config.txt_document_bytes}; use 16384"
            )

    def key(self) -> dict[str, str]:
        paths = self._paths()
        remembered: Path | None = None
        with suppress(DataError):
            remembered = cache_folder(self.config) / "corpora"
        endings = (next((e for e in _ENDINGS if p.name.endswith(e)), "") for p in paths)
        try:
            content = content_digest(paths, remembered)
        except OSError as error:
            raise DataError(
                f"data.files must be files that can be read, but {error.filename} cannot "
                f"({error.strerror or error}); check it"
            ) from error
        return {
            "the text": digest("text", content, *endings),
            "data.field": self.config.field,
            "data.txt_document_bytes": str(self.config.txt_document_bytes),
        }

    def _paths(self) -> list[Path]:
        found = [path for pattern in self.config.files for path in _matches(pattern)]
        return list(dict.fromkeys(found))

    def units(self) -> list[CorpusPart]:
        units: list[CorpusPart] = []
        for path in self._paths():
            if path.suffix == ".parquet":
                # Arrow is heavy, and most corpora do without.
                from regrow.trainer.data.parquet import row_groups

                units += [CorpusPart(str(path), g, g + 1) for g in range(row_groups(path, self.config.field))]
                continue
            self._check_beginning(path)
            if path.name.endswith((".txt", ".jsonl")):
                size = path.stat().st_size
                starts = range(0, size, _UNIT_BYTES) if path.suffix == ".jsonl" else range(min(size, 1))
                units += [CorpusPart(str(path), s, s + _UNIT_BYTES) for s in starts]
            else:
                units.append(CorpusPart(str(path)))
        return units

    def _check_beginning(self, path: Path) -> None:
        """Reads the first document, so that a wrong field is not found after hours."""
        if path.suffix == ".txt":
            next(read_text(path, 1), None)
        else:
            next(read_json_lines(path, self.config.field, Notes()), None)

    def read(self, unit: CorpusPart) -> Iterator[str]:
        path = Path(unit.path)
        if path.suffix == ".txt":
            yield from read_text(path, self.config.txt_document_bytes)
        elif path.suffix == ".parquet":
            # See `units`.
            from regrow.trainer.data.parquet import read_row_group

            yield from read_row_group(path, unit.start, self.config.field, self.notes)
        else:
            yield from read_json_lines(path, self.config.field, self.notes, unit.start, unit.stop)


def _matches(pattern: str) -> list[Path]:
    """The files that a path or glob names, sorted; a name that exists is taken as it is, brackets and all.

    Raises:
        DataError: it names a folder.
        FileNotFoundError: it names nothing.
    """
    try:
        path = Path(pattern).expanduser()
        found = sorted(_expand(path)) if pattern and "\0" not in pattern else []
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.files must name files, but {pattern} cannot be looked up ({error}); check it"
        ) from error
    if not found:
        raise FileNotFoundError(f"data.files must name files that exist, but {pattern} matches none; check the path")
    files = [Path(m) for m in found if not Path(m).is_dir()]
    if not files:
        raise DataError(
            f"data.files must name files, but {pattern} is a folder; use for instance {Path(found[0]) / '*.jsonl'}"
        )
    return files


def _expand(path: Path) -> list[str]:
    """What a glob matches; a part that exists by its very name is that name, as `a[1].txt` is."""
    bases = [path.anchor]
    for i, part in enumerate(path.parts[1 if path.anchor else 0 :], 1 if path.anchor else 0):
        if part == "**":
            rest = str(Path(*path.parts[i:]))
            return [m for b in bases for m in glob(str(Path(escape(b)) / rest), recursive=True)]  # noqa: PTH207
        step: list[str] = []
        for base in bases:
            literal = str(Path(base) / part)
            if os.path.lexists(literal):
                step.append(literal)
            else:
                step += glob(str(Path(escape(base)) / part))  # noqa: PTH207
        bases = step
    return bases
