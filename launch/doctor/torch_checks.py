"""What the probes say, as verdicts."""

import functools
import json
import os
import platform
import re
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, final

import psutil

from regrow.launch.doctor.verdict import State, Verdict

__all__ = ["TorchProbe", "check_ranks"]

_DRIVER = Path("/proc/driver/nvidia/version")


def _run(module: str, arguments: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", f"regrow.launch.doctor.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@functools.cache
def _least_torch() -> tuple[int, ...]:
    """The version that this Regrow asks for."""
    try:
        wanted = next(r for r in requires("regrow") or () if re.match(r"torch\b", r))
        return tuple(int(n) for n in re.findall(r"\d+", wanted)[:2])
    except (PackageNotFoundError, StopIteration):
        return (2, 11)


@final
class TorchProbe:
    """Torch's own word, asked for once by whichever check comes first.

    Args:
        overrides: of the run whose checkpoint is measured.
        timeout_s: of the probe.
    """

    def __init__(self, overrides: list[str], timeout_s: float) -> None:
        self._overrides, self._timeout_s = overrides, timeout_s
        self._lock = threading.Lock()
        self._found: dict[str, Any] | None = None
        self._problem = ""

    def ask(self) -> dict[str, Any] | None:
        """What it says; None where torch cannot be imported here."""
        with self._lock:
            if self._found is None and not self._problem:
                done = _run("torch_probe", self._overrides, self._timeout_s)
                lines = done.stdout.strip().splitlines()
                if done.returncode == 0 and lines:
                    self._found = json.loads(lines[-1])
                else:
                    self._problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return self._found

    def check_versions(self) -> Verdict:
        """Whether Python, torch, CUDA, the driver and Triton fit each other."""
        found = self.ask()
        python = f"Python {platform.python_version()}"
        if found is None:
            return Verdict(
                name="versions", state=State.broken, found=f"{python}; torch cannot be imported: {self._problem}",
                remedy="install it anew: pip install --force-reinstall torch",
            )  # fmt: skip
        cuda = f"CUDA {found['cuda']}" if found["cuda"] else "no CUDA"
        told = f"{python}, torch {found['torch']}, {cuda}, {'Triton' if found['triton'] else 'no Triton'}"
        least = _least_torch()
        if tuple(int(n) for n in re.findall(r"\d+", found["torch"])[:2]) < least:
            needed = ".".join(map(str, least))
            return Verdict(name="versions", state=State.broken, found=told, remedy=f"pip install 'torch>={needed}'")
        driver = _DRIVER.exists()
        if driver and not found["cuda"]:
            return Verdict(
                name="versions", state=State.warning, found=f"{told}, though there is a driver for NVIDIA's GPUs",
                remedy="install a torch with CUDA: see pytorch.org/get-started",
            )  # fmt: skip
        if found["cuda"] and driver and not found["available"]:
            return Verdict(
                name="versions", state=State.broken, found=f"{told}, and torch finds no GPU through this driver",
                remedy="update the driver, or install a torch for an older CUDA; compare nvidia-smi",
            )  # fmt: skip
        if found["available"] and not found["compiles"]:
            return Verdict(
                name="versions", state=State.warning, found=f"{told}; train.compile finds no Triton or C compiler",
                remedy="install triton and gcc; without them runs are slower",
            )  # fmt: skip
        return Verdict(name="versions", state=State.ok, found=told)

    def check_devices(self) -> Verdict:
        """What there is to compute with."""
        found = self.ask()
        memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
        host = f"{cores} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory free"
        devices = [] if found is None else found["devices"]
        if not devices:
            return Verdict(name="devices", state=State.ok, found=f"no GPU; {host}")
        told = ", ".join(
            f"{d['name']} ({d['free'] / 2**30:.0f} of {d['total'] / 2**30:.0f} GiB free)" for d in devices
        )
        broken = [str(n) for n, d in enumerate(devices) if not d["works"]]
        busy = [str(n) for n, d in enumerate(devices) if d["free"] < 0.8 * d["total"]]
        if broken:
            return Verdict(
                name="devices", state=State.broken, found=f"{told}; {host}; GPU {', '.join(broken)} computes wrongly",
                remedy="leave these out (CUDA_VISIBLE_DEVICES) and have them looked at",
            )  # fmt: skip
        if busy:
            return Verdict(
                name="devices", state=State.warning, found=f"{told}; {host}",
                remedy=f"another process holds memory of GPU {', '.join(busy)}; see nvidia-smi",
            )  # fmt: skip
        return Verdict(name="devices", state=State.ok, found=f"{told}; {host}")

    def checkpoint_bytes(self) -> int | None:
        """Of the run's model."""
        found = self.ask()
        size = None if found is None else found["checkpoint_bytes"]
        return size if isinstance(size, int) else None


def check_ranks(backend: str, ranks: int, timeout_s: float) -> Verdict:
    """Whether ranks that are started here can reduce together.

    Args:
        backend: `gloo` or `nccl`.
        ranks: how many.
        timeout_s: of all.
    """
    done = _run("rank_probe", [backend, str(ranks)], timeout_s)
    if done.returncode == 0:
        rate = (4 << 20) / float(done.stdout.split()[-1]) / 1e6
        return Verdict(name=backend, state=State.ok, found=f"{ranks} ranks reduce together, {rate:,.0f} MB/s")
    variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
    chosen = os.environ.get(variable)
    remedy = (
        f"{variable}={chosen} must be an interface of this machine (ip link); unset it or choose another"
        if chosen
        else f"set {variable} to an interface of this machine (ip link), and let ranks reach each other on it"
    )
    problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Verdict(name=backend, state=State.broken, found=f"{ranks} ranks do not meet: {problem}", remedy=remedy)
