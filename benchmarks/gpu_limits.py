"""What the card can do at most, and its own tests: each function runs in a process of its own."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu_runs import Job, Report

__all__ = ["limits", "tests"]

REPO = Path(__file__).resolve().parent.parent


def limits(job: Job, report: Report) -> None:
    """Rates of a bf16 product, of a copy on the device, and of copies to and from page-locked memory."""
    device = torch.device("cuda" if torch.cuda.is_available() and not job.tiny else "cpu")
    gpu = device.type == "cuda"
    report(device=torch.cuda.get_device_name() if gpu else "cpu", torch=str(torch.__version__))
    n, size = (8192, 1 << 30) if gpu else (256, 1 << 22)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    report(bf16_tflops=round(2 * n**3 / _seconds(lambda: a @ b, gpu=gpu) / 1e12, 3))
    if gpu:
        _fp8(report, n, a, b)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    report(copy_tb_per_s=round(2 * size / _seconds(lambda: target.copy_(source), gpu=gpu) / 1e12, 4))
    if not gpu:
        report(to_pinned_gib_per_s="not run: there is no GPU", from_pinned_gib_per_s="not run: there is no GPU")
        return
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    to_s = _seconds(lambda: pinned.copy_(source, non_blocking=True), gpu=True)
    from_s = _seconds(lambda: source.copy_(pinned, non_blocking=True), gpu=True)
    report(to_pinned_gib_per_s=round(size / 2**30 / to_s, 1), from_pinned_gib_per_s=round(size / 2**30 / from_s, 1))


def _fp8(report: Report, n: int, a: torch.Tensor, b: torch.Tensor) -> None:
    """The rate of a float8 product with one scale a tensor; cards before Hopper have none."""
    try:
        left, right = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=a.device)
        seconds = _seconds(
            lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True), gpu=True
        )
        report(fp8_tflops=round(2 * n**3 / seconds / 1e12, 1))
    except (RuntimeError, TypeError) as error:
        report(fp8_tflops=f"failed: {error}"[:200])


def _seconds(work: Callable[[], object], *, gpu: bool) -> float:
    """The median of ten timed calls."""
    times = []
    for _ in range(13):
        if gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return float(statistics.median(times[3:]))


def tests(_job: Job, report: Report) -> None:
    """tests/gpu; without a GPU each of them is skipped, which the summary says."""
    # Other plugins that a machine may have are of no use here, and some raise warnings.
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    # Most of them start runs, which wait for compilers and for each other.
    command += ["-p", "xdist.plugin", "-n", "4"] if torch.cuda.is_available() else []
    passed, failures, last = 0, list[str](), "no output"
    with subprocess.Popen(
        [*command, "tests/gpu"], cwd=REPO, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
            passed += " PASSED" in line
            if line.startswith(("FAILED", "ERROR")):
                failures.append(last)
            # What is known when the time is up.
            report(summary=f"{passed} passed so far", failures=failures)
    report(summary=last, failures=failures)
    if process.returncode:
        raise RuntimeError(f"pytest ended with exit code {process.returncode}: {last}")
