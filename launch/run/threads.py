"""How many CPU threads a rank gets: `launch.threads_per_rank`, else OMP_NUM_THREADS, else its share of the cores."""

import logging
import re
from collections.abc import Mapping

__all__ = ["threads_per_rank"]

log = logging.getLogger(__name__)


def threads_per_rank(wanted: int, environ: Mapping[str, str], *, local_ranks: int) -> int:
    """Threads for each rank; 0 shares the cores. What is not heeded is logged.

    Args:
        wanted: `launch.threads_per_rank`.
        environ: the environment, before a launcher of ours adds to it.
        local_ranks: started here by torchrun or srun; 1 where we start them.
    """
    text = environ.get("OMP_NUM_THREADS", "").strip()
    # A list is for nested regions; the first counts.
    first = re.match(r"([1-9][0-9]{0,5})\s*(,|$)", text)
    if not text:
        return wanted
    if wanted:
        if first is None or int(first.group(1)) != wanted:
            log.info("launch.threads_per_rank=%d is used, not OMP_NUM_THREADS=%s", wanted, text)
        return wanted
    if first is None:
        log.warning("OMP_NUM_THREADS must be a whole number of at least 1, but is %r; the cores are shared", text)
        return 0
    if "TORCHELASTIC_RUN_ID" in environ and local_ranks > 1 and text == "1":
        log.info(
            "OMP_NUM_THREADS=1 is torchrun's default: the cores are shared; launch.threads_per_rank=1 asks for 1"
        )
        return 0
    return int(first.group(1))
