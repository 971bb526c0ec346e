"""`regrow doctor [OVERRIDE …]`: what of this machine would keep a run from working, and what to do about it."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from regrow.launch.config.composition import compose_config
from regrow.launch.config.refusals import Refused, refusing
from regrow.launch.config.schema import register_schemas
from regrow.launch.doctor.disk import check_bandwidth, check_space, check_writing
from regrow.launch.doctor.host import (
    check_clock,
    check_git,
    check_locked_memory,
    check_open_files,
    check_shared_memory,
)
from regrow.launch.doctor.services import check_slurm, check_wandb
from regrow.launch.doctor.torch_checks import TorchProbe, check_ranks
from regrow.launch.doctor.verdict import Check, State, Verdict, run_checks
from regrow.launch.exit_code import ExitCode
from regrow.trainer.places import user_cache

__all__ = ["main"]

_SIGNS = {State.ok: "ok", State.warning: "warning", State.broken: "BROKEN", State.absent: "-"}


def main(arguments: list[str]) -> int:
    """The command; returns its exit code: 0 when nothing is broken, else 1; 2 for bad input.

    Args:
        arguments: what follows `doctor`.
    """
    parser = argparse.ArgumentParser(prog="regrow doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a list of verdicts instead of lines")
    parser.add_argument("--limit", type=float, default=60.0, metavar="S", help="seconds for each check; 60")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of the run that is to work here")
    given = parser.parse_args(arguments)
    try:
        verdicts = examine(given.overrides, given.limit)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.bad_input
    if given.json:
        print(json.dumps([{**dataclasses.asdict(v), "state": v.state.value} for v in verdicts], indent=1))
    else:
        _show(verdicts)
    broken = any(v.state is State.broken for v in verdicts)
    return ExitCode.failed if broken else ExitCode.done


def examine(overrides: Sequence[str], limit_s: float) -> list[Verdict]:
    """All verdicts, in order.

    Args:
        overrides: of the run that is to work here.
        limit_s: for each check.

    Raises:
        Refused: the overrides cannot be composed.
    """
    # Hydra's own groups are no fields of the run.
    own = [o for o in overrides if not o.startswith("hydra")]
    register_schemas()
    with refusing():
        config = compose_config(own)
        root = Path(config.run.root)
    slurm = any(o.startswith("hydra/launcher=slurm") for o in overrides) or "SLURM_JOB_ID" in os.environ
    probe = TorchProbe(own, limit_s)

    def space() -> Verdict:
        return check_space(root, probe.checkpoint_bytes() if config.checkpoint.enable else 0, _kept(config))

    def nccl() -> Verdict:
        found = probe.ask()
        ranks = 0 if found is None else len(found["devices"])
        if ranks == 0:
            return Verdict(name="nccl", state=State.absent, found="no GPU")
        return check_ranks("nccl", ranks, limit_s)

    looks = {
        "versions": probe.check_versions,
        "devices": probe.check_devices,
        "gloo": lambda: check_ranks("gloo", 2, limit_s),
        "nccl": nccl,
        "run.root": lambda: check_writing("run.root", root, "run.root=FOLDER"),
        "cache": lambda: check_writing("cache", user_cache(), "XDG_CACHE_HOME=FOLDER"),
        "disk space": space,
        "disk speed": lambda: check_bandwidth(root),
        "shared memory": check_shared_memory,
        "open files": check_open_files,
        "locked memory": check_locked_memory,
        "clock": lambda: check_clock(os.environ),
        "Slurm": lambda: check_slurm(wanted=slurm),
        "W&B": lambda: check_wandb(os.environ, _wandb_mode(config)),
        "git": lambda: check_git(Path.cwd()),
    }
    return run_checks([Check(name=name, look=look, limit_s=limit_s) for name, look in looks.items()])


def _kept(config: DictConfig) -> int:
    """Steps that are kept; 0 of them means all, of which the first must fit."""
    return int(config.checkpoint.keep_latest_k)


def _wandb_mode(config: DictConfig) -> str | None:
    """Of the run's logger; None where none is W&B."""
    targets = [str(hook._target_) for hook in config.hooks.values() if hook.enabled]
    return config.wandb.mode.value if any(".wandb." in t for t in targets) else None


def _show(verdicts: Sequence[Verdict]) -> None:
    width = max(len(v.name) for v in verdicts)
    for verdict in verdicts:
        print(f"{_SIGNS[verdict.state]:<8} {verdict.name:<{width}}  {verdict.found}")
        if verdict.remedy:
            print(f"{'':<8} {'':<{width}}  → {verdict.remedy}")
    counts = {state: sum(v.state is state for v in verdicts) for state in State}
    print(f"{counts[State.broken]} broken, {counts[State.warning]} warnings, {counts[State.ok]} in order")
