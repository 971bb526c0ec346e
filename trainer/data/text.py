"""Text files: .txt, .jsonl (plain, .gz, .zst) and .parquet."""

import gzip
import io
import json
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import IO, final

from trainer.data.config import TextConfig
from trainer.data.source import TextUnits, Unit, digest

__all__ = ["TextSource"]

_UNIT_BYTES = 64 << 20
_ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@final
class TextSource(TextUnits):
    """See `TextConfig`."""

    config: TextConfig

    def check(self) -> None:
        if not self.config.files:
            raise ValueError("data.files must name at least one file or glob, but is []; use data.files=[a.txt]")
        for path in self._paths():
            if not path.name.endswith(_ENDINGS):
                raise ValueError(
                    f"data.files must end in one of {', '.join(_ENDINGS)}, but holds {path}; convert it first"
                )
        if self.config.txt_document_bytes < 0:
            raise ValueError(
                f"data.txt_document_bytes must be at least 0, but is {self.config.txt_document_bytes}; use 16384"
            )

    def key(self) -> str:
        stats = (p.stat() for p in self._paths())
        names = (f"{p.resolve()}:{s.st_size}:{s.st_mtime_ns}" for p, s in zip(self._paths(), stats, strict=True))
        return digest("text", self.config.field, str(self.config.txt_document_bytes), *names)

    def _paths(self) -> list[Path]:
        found: list[Path] = []
        for pattern in self.config.files:
            matches = sorted(glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207
            if not matches:
                raise FileNotFoundError(
                    f"data.files must name files that exist, but {pattern} matches none; check the path"
                )
            found += [Path(m) for m in matches if Path(m).is_file()]
        return list(dict.fromkeys(found))

    def units(self) -> list[Unit]:
        units: list[Unit] = []
        for path in self._paths():
            if path.name.endswith((".txt", ".jsonl")):
                size = path.stat().st_size
                starts = range(0, size, _UNIT_BYTES) if path.suffix == ".jsonl" else range(min(size, 1))
                units += [Unit(str(path), s, s + _UNIT_BYTES) for s in starts]
            elif path.suffix == ".parquet":
                units += [Unit(str(path), g, g + 1) for g in range(_row_groups(path))]
            else:
                units.append(Unit(str(path)))
        return units

    def read(self, unit: Unit) -> Iterator[str]:
        path = Path(unit.path)
        if path.suffix == ".txt":
            yield from _cut(path, self.config.txt_document_bytes)
        elif path.suffix == ".parquet":
            yield from self._read_parquet(unit)
        elif path.suffix == ".gz":
            with gzip.open(path, "rb") as lines:
                yield from self._read_json_lines(path, lines)
        elif path.suffix == ".zst":
            import zstandard

            with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
                yield from self._read_json_lines(path, io.BufferedReader(stream))
        else:
            with path.open("rb") as lines:
                yield from self._read_json_lines(path, _line_range(lines, unit.start, unit.stop))

    def _read_json_lines(self, path: Path, lines: Iterator[bytes] | IO[bytes]) -> Iterator[str]:
        for line in lines:
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self.config.field]
                if not isinstance(text, str | None):
                    raise TypeError(f"{type(text).__name__} instead of text")
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"data.files: each line of {path} must be a JSON object with the field "
                    f"{self.config.field!r}, but one begins with {line[:60]!r}; set data.field"
                ) from error
            if text:
                yield text

    def _read_parquet(self, unit: Unit) -> Iterator[str]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(unit.path)
        if self.config.field not in file.schema_arrow.names:
            raise ValueError(
                f"data.field must be a column of {unit.path} ({', '.join(file.schema_arrow.names)}), "
                f"but is {self.config.field!r}; set data.field"
            )
        for text in file.read_row_group(unit.start, columns=[self.config.field])[self.config.field].to_pylist():
            if text:
                yield str(text)


def _row_groups(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.ParquetFile(path).num_row_groups)


def _line_range(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin within [start, stop)."""
    file.seek(max(0, start - 1))
    if start > 0:
        file.readline()  # the line that begins before `start` belongs to the part before
    while file.tell() < stop:
        line = file.readline()
        if not line:
            return
        yield line


def _cut(path: Path, size: int) -> Iterator[str]:
    """A text file's documents: cut at the first blank line after `size` bytes."""
    if size == 0:
        yield path.read_text(encoding="utf-8", errors="replace")
        return
    parts: list[str] = []
    length = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            parts.append(line)
            length += len(line)
            if length >= size and not line.strip():
                yield "".join(parts)
                parts, length = [], 0
    if "".join(parts).strip():
        yield "".join(parts)
