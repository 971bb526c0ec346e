"""Fewer points of a curve, with its lowest and highest values kept. Pure."""

from collections.abc import Sequence

__all__ = ["thin"]


def thin(values: Sequence[float], points: int) -> list[int]:
    """Which points to keep: the first, the last, and of each of equal pieces between them the lowest and the highest.

    Args:
        values: of a curve, in order.
        points: to keep at most, at least 4; fewer values are kept as they are.

    Returns:
        Ascending places in `values`.
    """
    n = len(values)
    if n <= points:
        return list(range(n))
    pieces = max(1, (points - 2) // 2)
    kept = [0]
    for piece in range(pieces):
        low, high = 1 + piece * (n - 2) // pieces, 1 + (piece + 1) * (n - 2) // pieces
        part = values[low:high]
        lowest, highest = low + part.index(min(part)), low + part.index(max(part))
        kept += sorted({lowest, highest})
    return [*kept, n - 1]
