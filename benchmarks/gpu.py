"""What one GPU does, within a time budget: the tests that need it, the machine's limits, training, saving.

    python -m benchmarks.gpu --budget 330 --json FILE [--only part,…] [--tiny]
    python -m benchmarks.gpu --into docs/benchmarks.md --from FILE

Each part is a process of its own, with a bound of its own, out of a server that has loaded torch and Regrow already.
What a part has found is kept whatever comes later, in it or in another one. Parts run in the order of their worth,
and what does not fit into the budget is listed as not run. `--tiny` runs every part with tiny sizes on the CPU.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import gpu_limits, gpu_runs
from benchmarks.gpu_runs import Job, Report, write_corpus
from benchmarks.gpu_table import put_into, table
from regrow.launch.run.allocator import use_expandable_segments

__all__ = ["PARTS", "Part", "main", "run_part"]

_SERVER = multiprocessing.get_context("forkserver")
# Neither Inductor, which starts processes of its own, nor anything that asks for a GPU.
_LOADED = ["torch.distributed.fsdp", "torch.distributed.pipelining", "sympy", "networkx", "jinja2", "hydra",
           "regrow.launch.app", "regrow.launch.run.start", "regrow.launch.run.rank", "regrow.trainer.hooks.begin",
           "regrow.trainer.hooks.checkpoint", "regrow.trainer.data.text", "benchmarks.gpu_runs"]  # fmt: skip
# What is left of the budget must be at least this for a part to be begun.
_LEAST_S = 6.0
_PATIENCE = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Something to measure.

    Attributes:
        run: is given the job, and reports what it finds as it finds it.
        bound_s: seconds after which it is ended.
    """

    run: Callable[[Job, Report], None]
    bound_s: float


# In the order of their worth.
PARTS: dict[str, Part] = {
    "limits": Part(run=gpu_limits.limits, bound_s=25),
    "tests": Part(run=gpu_limits.tests, bound_s=180),
    "1b": Part(run=gpu_runs.one_b, bound_s=150),
    "1b_plain_pytorch": Part(run=gpu_runs.plain_peer, bound_s=75),
    "8b_bf16_params": Part(run=gpu_runs.eight_b_bf16_params, bound_s=80),
    "8b_bf16": Part(run=gpu_runs.eight_b_bf16, bound_s=70),
    "8b_fp8": Part(run=gpu_runs.eight_b_fp8, bound_s=80),
    "1b_8k_whole": Part(run=gpu_runs.whole_8k, bound_s=60),
    "1b_8k_documents": Part(run=gpu_runs.documents_8k, bound_s=60),
    "1b_transformers": Part(run=gpu_runs.transformers_peer, bound_s=90),
    "moe": Part(run=gpu_runs.moe, bound_s=70),
    "3b": Part(run=gpu_runs.three_b, bound_s=80),
    "save_async": Part(run=gpu_runs.save_async, bound_s=120),
    "1b_offload": Part(run=gpu_runs.offloaded, bound_s=60),
    "1b_recomputed": Part(run=gpu_runs.budgets, bound_s=120),
    "1b_eager": Part(run=gpu_runs.eager, bound_s=45),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; 0 when each that was run succeeded."""
    options = _options(arguments)
    if options.into is not None:
        put_into(options.into, json.loads(options.taken_from.read_text()))
        return 0
    use_expandable_segments(os.environ)
    # Children make their own pool of compiler processes, when they first need it.
    os.environ["TORCH_WARM_POOL"] = "0"
    _SERVER.set_forkserver_preload(_LOADED)
    wanted = options.only.split(",") if options.only else list(PARTS)
    results: dict[str, Any] = {name: {"not_run": "not asked for"} for name in PARTS if name not in wanted}
    deadline = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory(prefix="regrow-gpu-", ignore_cleanup_errors=True) as folder:
        job = Job(tiny=options.tiny, folder=Path(folder))
        write_corpus(job.folder / "text.jsonl", documents=200 if job.tiny else 6000)
        _start_server()
        for name in wanted:
            log = (options.logs or job.folder) / f"{name}.log"
            results[name] = run_part(PARTS[name], job, deadline, log.absolute())
            print(f"{name}: {json.dumps(results[name])}", flush=True)
            if options.json is not None:
                ordered = {n: results[n] for n in PARTS if n in results}
                options.json.write_text(json.dumps(ordered, indent=1))
    print(table({n: results[n] for n in PARTS}))
    return int(any("failed" in r for r in results.values()))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=float(os.environ.get("BUDGET_S") or 330))
    parser.add_argument("--only", default=os.environ.get("ONLY", ""), help="parts, with commas between")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="a folder for what the parts print")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--into", type=Path, help="a page that takes in a table of --from")
    parser.add_argument("--from", type=Path, dest="taken_from", help="a file that --json wrote")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.only.split(",")) - {*PARTS, ""})
    if unknown:
        parser.error(f"--only must name parts out of {', '.join(PARTS)}, but names {', '.join(unknown)}")
    if (options.into is None) != (options.taken_from is None):
        parser.error("--into must come with --from FILE, which --json wrote")
    return options


def _start_server() -> None:
    """Has the server load what all parts need, which is no part's own time."""
    first = _SERVER.Process(target=_nothing)
    first.start()
    first.join()


def _nothing() -> None:
    return


def run_part(part: Part, job: Job, deadline: float, log: Path) -> dict[str, Any]:
    """A part's results, and why they are not all there where they are not.

    Args:
        part: to run in a process of its own.
        job: what it is given.
        deadline: of all parts, on the monotonic clock.
        log: takes what it prints.
    """
    left = deadline - time.monotonic()
    if left < _LEAST_S:
        return {"not_run": "the budget is used up"}
    # A tiny run is to come to its end on a busy machine too.
    started, bound = time.monotonic(), min(part.bound_s * (_PATIENCE if job.tiny else 1), left)
    log.parent.mkdir(parents=True, exist_ok=True)
    receiver, sender = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_child, args=(part, job, sender, log))
    process.start()
    sender.close()
    found: dict[str, Any] = {}
    problem = _collect(receiver, found, started + bound)
    if problem is not None:
        found["failed"] = f"not done after {bound:.0f} s" if problem == "late" else problem
        found["log"] = log.read_text(errors="replace")[-1500:] if log.exists() else ""
    _end(process)
    return {**found, "part_s": round(time.monotonic() - started, 1)}


def _collect(receiver: Connection, found: dict[str, Any], deadline: float) -> str | None:
    """Takes in what a part reports until it is done; what went wrong, `late` where it takes too long."""
    while True:
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            return "late"
        try:
            kind, value = receiver.recv()
        except EOFError:
            return "its process died"
        if kind == "done":
            return None
        if kind == "failed":
            return str(value)
        found.update(value)


def _end(process: Any) -> None:
    """Ends a part's process, with what it has started."""
    process.join(3.0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _child(part: Part, job: Job, pipe: Connection, log: Path) -> None:
    """A part, in its own process and session; what it prints goes into a file."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(job.folder)
    os.environ.pop("TORCH_WARM_POOL", None)
    try:
        part.run(job, lambda **values: pipe.send(("found", values)))
        pipe.send(("done", None))
    except BaseException as error:  # the next part is run whatever happened in this one
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}"[:2000]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
