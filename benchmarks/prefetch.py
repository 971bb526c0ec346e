"""Reading ahead in a thread or in a process: seconds a batch, from asking for it to having it.

    python -m benchmarks.prefetch

The default corpus; 16 sequences of 256 tokens a batch; the medians of 200 batches each, in turn, and of their ratios.
"read" is the work itself; "process" is what handing the finished tensors from another process adds to it. "mixture"
reads the corpus as three sources by weight with a stage, "packed" its documents by best fit, "labels" a mask.
"""

import functools
import statistics
from typing import Any

import numpy as np
import torch.multiprocessing as mp

from benchmarks.pairs import Seconds, machine, ratios, seconds
from regrow.trainer.data.config import StdlibConfig, TooLong
from regrow.trainer.data.label_mask import ArrayMask, LabelMask
from regrow.trainer.data.loader import step_batch
from regrow.trainer.data.mixture import StagePlan, as_mixture
from regrow.trainer.data.packed_windows import PackedWindows
from regrow.trainer.data.prepare import prepare
from regrow.trainer.data.samples import Samples
from regrow.trainer.data.stdlib import StdlibSource
from regrow.trainer.data.token_store import TokenStore
from regrow.trainer.data.windows import ConcatWindows

__all__ = ["main"]


def read(samples: Samples, index: int) -> Any:
    """One batch."""
    return step_batch(samples, samples.ids(index * 16, 16), rank=0, ranks=1, micro_batch_size=16, document_mask=False)


def mixture_of(store: TokenStore) -> Samples:
    """The same corpus three times, by weight."""
    names = ("web", "code", "books")
    weights = dict(zip(names, (0.7, 0.2, 0.1), strict=True))
    stages = [StagePlan(weights={"web": 0.1, "code": 0.1, "books": 0.8}, from_step=100)]
    windows = [ConcatWindows(store, 256, 0.05, validation=False) for _ in names]
    return Samples(names, windows, [0, 1, 2], as_mixture(weights, stages, seq_len=256, global_batch_size=16))


def packed_of(store: TokenStore, mask: LabelMask | None) -> Samples:
    """The corpus' documents by best fit."""
    windows = PackedWindows(store, 256, 0.05, validation=False, too_long=TooLong.split, mask=mask)
    return Samples([""], [windows], [0])


def serve(folder: Any, requests: Any, answers: Any) -> None:
    """The other process."""
    samples = Samples([""], [ConcatWindows(TokenStore(folder), 256, 0.05, validation=False)], [0])
    while (index := requests.get()) is not None:
        batch = read(samples, index)
        answers.put((batch.micro_batches[0].tokens, batch.micro_batches[0].labels))


def main() -> None:
    """Prints the medians."""
    folder = prepare(StdlibSource(StdlibConfig(seq_len=256)))
    store = TokenStore(folder)
    samples = Samples([""], [ConcatWindows(store, 256, 0.05, validation=False)], [0])
    others = {
        "mixture": mixture_of(store),
        "packed": packed_of(store, None),
        "labels": packed_of(store, ArrayMask(np.arange(store.index.tokens) % 3 > 0)),
    }
    context = mp.get_context("spawn")
    requests, answers = context.Queue(), context.Queue()
    process = context.Process(target=serve, args=(folder, requests, answers), daemon=True)
    process.start()
    requests.put(0)
    answers.get(timeout=60.0)
    rounds: list[dict[str, Seconds]] = []
    for index in range(200):
        here = seconds(functools.partial(read, samples, index))
        requests.put(index)
        # Without an end the benchmark would wait for a process that has died.
        there = seconds(lambda: answers.get(timeout=60.0))
        more = {name: seconds(functools.partial(read, other, index)) for name, other in others.items()}
        rounds.append({"read": here, "process": there, **more})
    requests.put(None)
    process.join()
    direct, handed = (statistics.median(r[n].wall for r in rounds) * 1e6 for n in ("read", "process"))
    print(machine())
    print(f"read {direct:.0f} us, through a process {handed:.0f} us a batch; "
          f"ratio {ratios(rounds, 'process', 'read')['wall']}")  # fmt: skip
    for name in others:
        print(f"{name}: ratio {ratios(rounds, name, 'read')['wall']}")


if __name__ == "__main__":
    main()
