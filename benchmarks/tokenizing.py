"""Tokenising: ours, `datasets.map` with the same tokenizer, and the tokenizer's own `encode_batch` by itself.

    python -m benchmarks.tokenizing --mb 100 --workers 2 --rounds 3

English and code of the standard library as .jsonl files, and a byte-level BPE of it. Each round runs all of them,
each in processes of its own. Timed are: of ours the whole of `prepare` (hashing and reading the files, starting
processes, writing the store); of `datasets` only `map(batched=True, num_proc=WORKERS)`, with the rows in Arrow
already; of `encode_batch` the calls alone, with the texts in memory. Memory is the RSS of all processes together, at
its highest; pages that processes share count for each. With `--only ours` a large corpus is tokenised for its memory
alone.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# Torch, `datasets` and ours are imported where they are used: each process has what it needs and nothing else.

__all__ = ["main", "run", "summary"]

OURS, MAP, BARE = "ours", "datasets.map", "encode_batch"
KINDS = (OURS, MAP, BARE)
_DOCUMENT_CHARACTERS = 4000
_TRAIN_CHARACTERS = 4 * 10**6
_SAMPLE_S = 0.05


class Measured(NamedTuple):
    """One run: seconds, tokens without those that end documents, and MiB of memory."""

    wall: float
    cpu: float
    tokens: int
    peak_mib: float
    peak_first_half_mib: float


def _pieces() -> Iterator[str]:
    """Documents of some thousand characters, endless."""
    from regrow.trainer.data.config import StdlibConfig
    from regrow.trainer.data.stdlib import StdlibSource

    source = StdlibSource(StdlibConfig())
    while True:
        for unit in source.units():
            for text in source.read(unit):
                for start in range(0, len(text), _DOCUMENT_CHARACTERS):
                    if piece := text[start : start + _DOCUMENT_CHARACTERS].strip():
                        yield piece


def make_corpus(folder: Path, mb: float, files: int, vocab_size: int) -> None:
    """Writes files of text, of `mb` MB in all, and their tokenizer."""
    from regrow.trainer.data.tokenizer import train_bpe

    pieces, size = _pieces(), 0
    for number in range(files):
        with (folder / f"text-{number:03d}.jsonl").open("w") as out:
            while size < mb * 10**6 * (number + 1) / files:
                piece = next(pieces)
                size += len(piece.encode())
                out.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
    head, some = 0, []
    for piece in _pieces():
        some.append(piece)
        head += len(piece)
        if head >= min(_TRAIN_CHARACTERS, mb * 10**6):
            break
    train_bpe(some, vocab_size, folder / "tokenizer.json")


def _texts(folder: Path) -> list[str]:
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.open())
    return [json.loads(line)["text"] for line in lines]


def _cpu() -> float:
    """CPU seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _ours(folder: Path, work: Path, workers: int) -> tuple[float, float, int]:
    import multiprocessing

    from regrow.trainer.data.config import TextConfig
    from regrow.trainer.data.prepare import prepare
    from regrow.trainer.data.text import TextSource
    from regrow.trainer.data.token_store import TokenStore

    files, tokenizer = [str(folder / "*.jsonl")], str(folder / "tokenizer.json")
    source = TextSource(TextConfig(files=files, tokenizer=tokenizer, cache=str(work), workers=workers))
    started, cpu = time.perf_counter(), _cpu()
    store = prepare(source)
    wall = time.perf_counter() - started
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    index = TokenStore(store).index
    return wall, _cpu() - cpu, index.tokens - index.documents


def _datasets_map(folder: Path, work: Path, workers: int) -> tuple[float, float, int]:
    import datasets
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    datasets.disable_progress_bars()
    files = [str(path) for path in sorted(folder.glob("*.jsonl"))]
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(work))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [e.ids for e in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}

    started, cpu = time.perf_counter(), _cpu()
    made = rows.map(encode, batched=True, num_proc=workers, remove_columns=rows.column_names)
    wall, cpu = time.perf_counter() - started, _cpu() - cpu
    return wall, cpu, sum(len(ids) for ids in made.with_format("numpy")["input_ids"])


def _encode_part(tokenizer_file: str, texts: Sequence[str], begin: Any, answers: Any) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    begin.wait()
    cpu, tokens = time.process_time(), 0
    for start in range(0, len(texts), 1000):
        tokens += sum(map(len, tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)))
    answers.put((time.process_time() - cpu, tokens))


def _encode_batch(folder: Path, _work: Path, workers: int) -> tuple[float, float, int]:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    texts, begin, answers = _texts(folder), context.Barrier(workers + 1), context.Queue()
    tokenizer = str(folder / "tokenizer.json")
    processes = [
        context.Process(target=_encode_part, args=(tokenizer, texts[w::workers], begin, answers))
        for w in range(workers)
    ]
    for process in processes:
        process.start()
    begin.wait()
    started = time.perf_counter()
    # Without an end the benchmark would wait for a process that has died.
    found = [answers.get(timeout=3600.0) for _ in processes]
    wall = time.perf_counter() - started
    for process in processes:
        process.join()
    return wall, sum(cpu for cpu, _ in found), sum(tokens for _, tokens in found)


_RUNS = {OURS: _ours, MAP: _datasets_map, BARE: _encode_batch}


def _watch(process: subprocess.Popen[str], samples: list[tuple[float, int]]) -> None:
    """The memory of a process and all below it, until it ends."""
    import psutil

    top = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for one in (top, *top.children(recursive=True)):
                try:
                    total += one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
        except psutil.NoSuchProcess:
            return
        samples.append((time.monotonic(), total))
        time.sleep(_SAMPLE_S)


def run(kind: str, folder: Path, workers: int) -> Measured:
    """Runs one of them in processes of its own, and watches their memory."""
    work = Path(tempfile.mkdtemp(prefix="tokenizing-", dir=folder))
    command = [sys.executable, "-m", "benchmarks.tokenizing", "--child", kind, str(folder), str(work)]
    environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    samples: list[tuple[float, int]] = []
    try:
        with subprocess.Popen(
            [*command, "--workers", str(workers)], env=environ, stdout=subprocess.PIPE, text=True
        ) as process:
            watcher = threading.Thread(target=_watch, args=(process, samples))
            watcher.start()
            output = process.communicate()[0]
            watcher.join()
        if process.returncode != 0:
            raise RuntimeError(f"{kind} ended with {process.returncode}")
    finally:
        shutil.rmtree(work)
    wall, cpu, tokens = json.loads(output.splitlines()[-1])
    middle = (samples[0][0] + samples[-1][0]) / 2
    peak, first = max(rss for _, rss in samples), max(rss for at, rss in samples if at <= middle)
    return Measured(wall, cpu, tokens, peak / 2**20, first / 2**20)


def summary(rounds: Sequence[Mapping[str, Measured]], mb: float) -> dict[str, Any]:
    """Speeds, ratios within rounds, and memory.

    Raises:
        ValueError: not all made the same number of tokens.
    """
    from benchmarks.pairs import Seconds, Spread, machine, ratios

    if len({one.tokens for each in rounds for one in each.values()}) > 1:
        raise ValueError("they must make the same tokens, but do not")
    seconds = [{kind: Seconds(one.wall, one.cpu) for kind, one in each.items()} for each in rounds]
    times = {f"{other} / {OURS}": ratios(seconds, other, OURS) for other in (MAP, BARE)}
    kinds = [kind for kind in KINDS if kind in rounds[0]]
    return {
        "machine": machine(),
        "mb": mb,
        "rounds": len(rounds),
        "mb_per_s": {k: asdict(Spread.of([mb / each[k].wall for each in rounds])) for k in kinds},
        "mb_per_cpu_s": {k: asdict(Spread.of([mb / max(each[k].cpu, 1e-9) for each in rounds])) for k in kinds},
        "ratios": {name: {c: asdict(s) for c, s in found.items()} for name, found in times.items() if found},
        "peak_mib": {k: max(each[k].peak_mib for each in rounds) for k in kinds},
        "peak_first_half_mib": {k: max(each[k].peak_first_half_mib for each in rounds) for k in kinds},
        "each": [{kind: one._asdict() for kind, one in each.items()} for each in rounds],
    }


def _print(found: Mapping[str, Any]) -> None:
    from benchmarks.pairs import Spread

    print(f"{found['machine']}; {found['mb']:g} MB, {found['rounds']} rounds, medians and quartiles")
    for kind, speed in found["mb_per_s"].items():
        print(
            f"{kind:14} {Spread(**speed)} MB/s, {Spread(**found['mb_per_cpu_s'][kind])} MB a CPU second, "
            f"peak {found['peak_mib'][kind]:.0f} MiB (first half {found['peak_first_half_mib'][kind]:.0f})"
        )
    for name, clocks in found["ratios"].items():
        print(f"seconds, {name}: {', '.join(f'{c} {Spread(**s)}' for c, s in clocks.items())}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100.0, help="text, in MB of 10⁶ bytes")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these and no others")
    parser.add_argument("--folder", type=Path, help="where the text is written; the temporary folder without")
    parser.add_argument("--json", type=Path, help="what was measured is written here after every round")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    args = _arguments()
    if args.child:
        kind, folder, work = args.child
        print(json.dumps(_RUNS[kind](Path(folder), Path(work), args.workers)))
        return
    from benchmarks.pairs import write_rounds

    kinds = [kind for kind in args.only or KINDS if kind != MAP or find_spec("datasets")]
    if MAP in (args.only or KINDS) and MAP not in kinds:
        print("datasets is not installed: it is left out", file=sys.stderr)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tokenizing-", dir=args.folder) as folder:
        make_corpus(Path(folder), args.mb, args.files, args.vocab_size)
        rounds: list[dict[str, Measured]] = []
        for number in range(args.rounds):
            # Whoever is first has it warmer or colder: each is, in turn.
            turn = number % len(kinds)
            rounds.append({kind: run(kind, Path(folder), args.workers) for kind in kinds[turn:] + kinds[:turn]})
            found = summary(rounds, args.mb)
            write_rounds(args.json, found)
    _print(found)


if __name__ == "__main__":
    main()
