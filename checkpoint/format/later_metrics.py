"""What was measured at a step after it had been committed: a file of its own, beside the manifest."""

import json
import math
from collections.abc import Mapping

from regrow.checkpoint.documents import DocumentError, read_document
from regrow.checkpoint.storage.base import Storage

__all__ = ["LATER_METRICS", "add_later_metrics", "read_later_metrics"]

LATER_METRICS = "measured.json"


def read_later_metrics(storage: Storage) -> dict[str, float]:
    """Values by name; none where the file is not there, or cannot be read: nothing is restored from them.

    Args:
        storage: the step's folder.
    """
    try:
        return read_document(storage.read(LATER_METRICS), dict[str, float])
    except (OSError, DocumentError):
        return {}


def add_later_metrics(storage: Storage, metrics: Mapping[str, float]) -> None:
    """Adds values to those that are there, atomically.

    Args:
        storage: the step's folder.
        metrics: by name; those that are not finite are left out.

    Raises:
        OSError: it cannot be written.
    """
    found = read_later_metrics(storage) | {n: v for n, v in metrics.items() if math.isfinite(v)}
    storage.write(LATER_METRICS, json.dumps(found, indent=2).encode())
