"""One word from rank 0 to ranks that were started for us, before any process group exists."""

import datetime
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from regrow.launch.config.errors import EXPLAINED

__all__ = ["share_from_rank_zero"]


def share_from_rank_zero(decide: Callable[[], dict[str, Any]], timeout_s: float) -> dict[str, Any] | str:
    """Runs `decide` on rank 0 and gives every rank its answer, or the sentence of its error.

    Args:
        decide: called on rank 0 alone; its answer is plain values.
        timeout_s: how long the others wait.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # One port above the training's own store; closed again before that one opens matters to nobody.
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]) + 1,
        world_size,
        is_master=rank == 0,
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    if rank == 0:
        try:
            answer: dict[str, Any] | str = decide()
        except (*EXPLAINED, OSError) as error:
            answer = str(error)
        store.set("answer", json.dumps(answer))
    result: dict[str, Any] | str = json.loads(store.get("answer"))
    store.add("read", 1)
    deadline = time.monotonic() + timeout_s
    while rank == 0 and store.add("read", 0) < world_size:
        # The store lives in this process: it must outlast the slowest reader, but not wait for a dead one.
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of the {world_size} ranks came up within {timeout_s:g} s")
        time.sleep(0.01)
    return result
