"""Numbers as people say them, and which lines of the log are for files alone. Standard library only."""

__all__ = ["FILE_ONLY", "count_text", "duration", "size_text"]

# `log.info(…, extra={FILE_ONLY: True})`: not on the terminal, where something else shows it.
FILE_ONLY = "file_only"


def count_text(count: float) -> str:
    """For instance 987, 1.23 M, 405 B."""
    if count < 10_000:
        return f"{count:,.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("B", 1e9)):
        if count / size < 999.5:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e12:,.3g} T"


def size_text(nbytes: float) -> str:
    """For instance 900 B, 15.2 MiB, 4.5 TiB."""
    units = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    for unit, size in units.items():
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """For instance 3 d 4 h, 2 h 05 min, 3 min 20 s, 7 s."""
    whole = round(seconds)
    if whole >= 172_800:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
