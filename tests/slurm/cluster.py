"""A real Slurm on this machine: controller, two virtual nodes with two fake GPUs each, munge. All of it lives in one
temporary folder, listens on loopback, and is stopped by pid.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil

from regrow.trainer.process import die_with_parent
from tests.support import wait_until

__all__ = ["Cluster", "Job", "running_cluster"]

NODES = ("n1", "n2")
GRACE_S = 8
_SYSTEM_CONFIG = Path("/etc/slurm/slurm.conf")
_CONFIG = """\
ClusterName=regrow
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={munge_socket}
CryptoType=crypto/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
MaxArraySize=1001
JobRequeue=1
KillWait=8
SlurmdTimeout=60
MinJobAge=1200
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=8000 Gres=gpu:2 State=UNKNOWN"


@dataclass(frozen=True)
class Job:
    """A row of squeue."""

    id: str
    state: str
    reason: str
    nodes: str
    started: str
    name: str


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(p.getsockname()[1]) for p in probes]


class Cluster:
    """The daemons and what tests do to them.

    Args:
        root: holds everything.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = {
            "SLURM_CONF": str(root / "slurm.conf"),
            # The nodes are this machine, and their names do not resolve.
            "MASTER_ADDR": "127.0.0.1",
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._nudging = threading.Event()
        self._nudger: threading.Thread | None = None

    def start(self) -> None:
        """Brings everything up; AssertionError when it does not come."""
        controller_port, *node_ports = _free_ports(1 + len(NODES))
        host, munge_socket = socket.gethostname().split(".")[0], self.root / "munge.socket"
        for name in ("state", *(f"spool-{n}" for n in NODES)):
            (self.root / name).mkdir()
        self.root.chmod(0o711)
        nodes = [_NODE.format(name=n, host=host, port=p) for n, p in zip(NODES, node_ports, strict=True)]
        (self.root / "slurm.conf").write_text(
            _CONFIG.format(
                host=host, root=self.root, controller_port=controller_port, munge_socket=munge_socket,
                nodes="\n".join(nodes), grace_s=GRACE_S,
            )
        )  # fmt: skip
        # Device files that exist everywhere: without cgroups no device is kept from anyone.
        (self.root / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.root / "munge.key").write_bytes(os.urandom(128))
        (self.root / "munge.key").chmod(0o400)
        self._spawn(
            "munged", ["munged", "--foreground", "--force", f"--socket={munge_socket}",
                       f"--key-file={self.root}/munge.key", f"--pid-file={self.root}/munged.pid",
                       f"--log-file={self.root}/munged.log", f"--seed-file={self.root}/munged.seed"],
        )  # fmt: skip
        wait_until(munge_socket.exists, 10.0, 0.05)
        self._spawn("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self._idle() == len(NODES), 30.0, 0.2)
        self._nudger = threading.Thread(target=self._nudge, daemon=True)
        self._nudger.start()

    def stop(self) -> None:
        """Ends all jobs and daemons, by pid."""
        self._nudging.set()
        with contextlib.suppress(subprocess.SubprocessError):
            self.command("scancel", "--user=root", "--signal=KILL", "--full")
            self.command("scancel", "--user=root")
            wait_until(lambda: not self.step_daemons(), 30.0, 0.2)
        for name in sorted(self._daemons, key=lambda n: (n == "munged", n == "slurmctld")):
            self._end(name)

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        log = (self.root / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            command, env={**os.environ, **self.environ}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=partial(die_with_parent, os.getpid()),
        )  # fmt: skip
        log.close()

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(15.0)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        self._spawn(node, ["slurmd", "-D", "-N", node])

    def stop_node(self, node: str) -> None:
        """Stops a node's slurmd; its steps go on."""
        self._end(node)

    def command(self, *arguments: str, check: bool = True) -> str:
        """Runs one of Slurm's commands; returns its output."""
        done = subprocess.run(
            arguments, env={**os.environ, **self.environ}, capture_output=True, text=True, timeout=30, check=False
        )
        if check and done.returncode:
            raise subprocess.SubprocessError(f"{' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def _idle(self) -> int:
        found = self.command("sinfo", "-h", "-N", "-p", "low", "-t", "idle,mix,alloc", "-o", "%N", check=False)
        return len(set(found.split()))

    def jobs(self) -> list[Job]:
        """Pending, running and completing jobs, a row per array task."""
        rows = self.command("squeue", "-h", "-r", "-o", "%i|%T|%r|%N|%S|%j").splitlines()
        jobs = [Job(*row.split("|", 5)) for row in rows]
        # Of one that waits it would be a guess, which changes.
        return [j if j.state == "RUNNING" else replace(j, started="") for j in jobs]

    def state(self, job: str) -> str:
        """Of one job, `GONE` when it is no longer queued."""
        return next((j.state for j in self.jobs() if j.id == job), "GONE")

    def step_daemons(self) -> list[psutil.Process]:
        """This cluster's slurmstepd processes."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.name() == "slurmstepd"
                    and process.environ().get("SLURM_CONF") == self.environ["SLURM_CONF"]
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def _nudge(self) -> None:
        """A requeued job would wait for two minutes.

        It needs some seconds of them: the node takes a start within the second of the kill for the killed one.
        """
        since: dict[str, float] = {}
        while not self._nudging.wait(0.5):
            try:
                waiting = {j.id for j in self.jobs() if j.state == "PENDING" and j.reason == "BeginTime"}
                since = {job: since.get(job, time.monotonic()) for job in waiting}
                for job in (j for j, first in since.items() if time.monotonic() - first > 2.5):
                    self.command("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
            except (subprocess.SubprocessError, ValueError):
                continue


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Refuses where a Slurm is configured already: nothing here may ever reach a real cluster."""
    configured = os.environ.get("SLURM_CONF") or (str(_SYSTEM_CONFIG) if _SYSTEM_CONFIG.exists() else None)
    assert configured is None, (
        f"tests/slurm must run where no Slurm is configured, but {configured} is there; leave them out"
    )
    # Sockets have short names, so not below pytest's folder.
    root = Path(tempfile.mkdtemp(prefix="regrow-slurm-"))
    cluster = Cluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        left = [p for p in psutil.process_iter() if str(root) in " ".join(_command_line(p))]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        shutil.rmtree(root, ignore_errors=True)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []


def main() -> None:
    """By hand: brings a cluster up until Ctrl-C or TERM, and prints what a shell needs to use it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running_cluster() as cluster:
        for name, value in cluster.environ.items():
            print(f"export {name}={value}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
