"""The batch script of one array: text from values, nothing else."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regrow.launch.exit_code import ExitCode

__all__ = ["Script", "ScriptRun", "Shape", "write_script"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The resources of a run.

    Attributes:
        ranks: how many it may have, the largest number first; several where it is elastic.
        tasks_per_node: ranks on a node.
        gpus_per_node: 0 for none.
    """

    ranks: tuple[int, ...]
    tasks_per_node: int
    gpus_per_node: int

    @property
    def nodes(self) -> tuple[int, int]:
        """Fewest and most."""
        return self.ranks[-1] // self.tasks_per_node, self.ranks[0] // self.tasks_per_node

    def __str__(self) -> str:
        gpus = f"-{self.gpus_per_node}gpus" if self.gpus_per_node else ""
        return f"{'-'.join(str(r) for r in self.ranks)}ranks-{self.tasks_per_node}per-node{gpus}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptRun:
    """One task of the array.

    Attributes:
        run_dir: absolute.
        arguments: of `regrow`.
    """

    run_dir: str
    arguments: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """What a script is written from.

    Attributes:
        sweep: the sweep's name, for W&B.
        folder: absolute; for the script, logs and notes.
        working_dir: where the ranks start.
        shape: of every run in it.
        runs: the array's tasks.
        options: sbatch's `--name=value` without those of the shape.
        env: variables for the ranks.
        setup: lines of shell before the ranks start.
        command: starts a rank.
        srun: further options of srun.
        grace_s: between the warning and the end.
        save_s: what a save must fit into, in seconds.
        max_requeues: after crashes.
        max_stuck: starts that reach no newer step.
        array_parallelism: runs at a time; 0 for any number.
    """

    sweep: str
    folder: str
    working_dir: str
    shape: Shape
    runs: Sequence[ScriptRun]
    options: Sequence[str]
    env: Mapping[str, str]
    setup: Sequence[str]
    command: Sequence[str]
    srun: Sequence[str]
    grace_s: int
    save_s: int
    max_requeues: int
    max_stuck: int
    array_parallelism: int


def write_script(script: Script) -> str:
    """The script's text."""
    return "\n".join([*_head(script), "", *_runs(script.runs), "", *_environment(script), "", _BODY.strip(), ""]) % {
        "ranks": " ".join(str(r) for r in script.shape.ranks),
        "tasks_per_node": script.shape.tasks_per_node,
        "srun": "".join(f" {shlex.quote(o)}" for o in script.srun),
        "command": shlex.join(script.command),
        "range": _range(script.shape),
        "max_requeues": script.max_requeues,
        "max_stuck": script.max_stuck,
        "folder": shlex.quote(script.folder).replace("%", "%%"),
        **{code.name: int(code) for code in ExitCode},
    }


def _range(shape: Shape) -> str:
    """What an elastic run's requeued job asks for; empty where it has one size."""
    low, high = shape.nodes
    return f'"NumNodes={low}-{high} NumTasks={shape.ranks[-1]}"' if low < high else ""


def _head(script: Script) -> list[str]:
    low, high = script.shape.nodes
    limit = f"%%{script.array_parallelism}" if script.array_parallelism else ""
    options = [
        *script.options,
        f"--array=0-{len(script.runs) - 1}{limit}" if len(script.runs) > 1 else "--array=0",
        f"--nodes={low}" if low == high else f"--nodes={low}-{high}",
        f"--ntasks-per-node={script.shape.tasks_per_node}",
        *([f"--gpus-per-node={script.shape.gpus_per_node}"] if script.shape.gpus_per_node else []),
        "--requeue",
        "--open-mode=append",
        f"--signal=USR2@{script.grace_s}",
        f"--chdir={_literal(script.working_dir)}",
        f"--output={_literal(script.folder)}/%%A_%%a.log",
    ]
    return [
        "#!/bin/bash",
        f"# {len(script.runs)} run(s) of {script.shape.ranks[0]} rank(s), written by regrow.",
        *(f"#SBATCH {o}" for o in options),
    ]


def _runs(runs: Sequence[ScriptRun]) -> list[str]:
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
    for index, run in enumerate(runs):
        lines += [
            f"  {index})",
            f"    run={_literal(run.run_dir)}",
            "    arguments=(",
            *(f"      {_literal(a)}" for a in run.arguments),
            "    ) ;;",
        ]
    return [*lines, "esac"]


def _environment(script: Script) -> list[str]:
    return [
        *(f"export {name}={_literal(value)}" for name, value in script.env.items()),
        f"export REGROW_SWEEP={_literal(script.sweep)} REGROW_GRACE_S={script.save_s}",
        'export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}',
        *(line.replace("%", "%%") for line in script.setup),
    ]


def _literal(text: str) -> str:
    """As one word of shell, in the quotes that are easier to read."""
    plain = "'" in text and not set(text) & set('"$`\\!')
    return (f'"{text}"' if plain else shlex.quote(text)).replace("%", "%%")


# The same for every script. `%%(…)s` is filled in; the reasons are those of docs/slurm.md.
_BODY = r"""
# The last task's SLURM_JOB_ID names the whole array, this names the task alone.
id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
notes=%(folder)s/$id-${SLURM_RESTART_COUNT:-0}
history=$run/slurm.jsonl
range=%(range)s
export REGROW_STOP_NOTE=$notes.stop

# The newest step that is safe, as the last start that trained knows it.
saved() {
  sed -n 's/.*"\(from\|saved\)_step": *\([0-9]*\).*/\2/p' "$run/run.json" 2>/dev/null | tail -n 2 | sort -n \
    | tail -n 1
}
note() {
  local step; step=$(saved)
  printf '{"time":%%s,"job":"%%s","restart":%%s,"node":"%%s","event":"%%s","step":%%s}\n' "$(date +%%s.%%3N)" \
    "$id" "${SLURM_RESTART_COUNT:-0}" "$SLURM_JOB_NODELIST" "$1" "${step:-0}" >> "$history"
}
# The steps of this job's lines with an event, oldest first.
steps() { sed -n "s/.*\"job\":\"$id\".*\"event\":\"$1\",\"step\":\([0-9]*\).*/\1/p" "$history" 2>/dev/null; }
running() { [[ $(squeue -h -j "$id" -o %%T 2>/dev/null) == RUNNING ]]; }
# Leaving the grace time of a preemption by oneself would end the job for good.
wait_to_be_killed() { for _ in {1..180}; do running || exit %(done)s; sleep 5; done; exit %(resumable)s; }
requeue() {
  # A job that its user cancelled is no longer running, and a requeue would bring it back.
  running || exit %(resumable)s
  trap '' TERM
  scontrol requeue "$id" || { note gave_up; exit %(failed)s; }
  # A job that has run keeps the size it had; one that may have another asks for its range again.
  [[ -z $range ]] || for _ in {1..5}; do scontrol update jobid="$id" $range && break; sleep 1; done
  trap 'exit %(done)s' TERM
  sleep 600 & wait
  exit %(resumable)s
}

mkdir -p "$run"
now=$(saved); now=${now:-0}; stuck=0
for step in $(steps start); do [[ $step == "$now" ]] && stuck=$((stuck + 1)) || stuck=0; done
if ((stuck >= %(max_stuck)s)); then
  echo "error: $run has started $stuck times without reaching a newer checkpoint than step $now; see $run/logs" >&2
  note stuck
  exit %(failed)s
fi
note start
rm -f "$run/stop.json" "$notes".*
: > "$REGROW_STOP_NOTE"

available=$((SLURM_JOB_NUM_NODES * %(tasks_per_node)s))
for ranks in %(ranks)s; do ((ranks <= available)) && break; done
terminated=0
trap terminated=1 TERM
# An srun that gets TERM kills its ranks before they can save. Apart from this shell it gets none.
( (
  trap '' TERM
  echo $BASHPID > "$notes.pid"
  setsid srun --nodes=$((ranks / %(tasks_per_node)s)) --ntasks=$ranks --ntasks-per-node=%(tasks_per_node)s \
    --kill-on-bad-exit=1%(srun)s %(command)s "${arguments[@]}"
  echo $? > "$notes.tmp" && mv "$notes.tmp" "$notes.code"
) & )
until [[ -e $notes.code ]] || { [[ -s $notes.pid ]] && ! kill -0 "$(<"$notes.pid")" 2>/dev/null; }; do sleep 0.5; done

code=$(cat "$notes.code" 2>/dev/null || echo 137)
signal=$(head -n 1 "$REGROW_STOP_NOTE")
end=$(sed -n 's/.*"kind": *"\([a-z]*\)".*/\1/p' "$run/stop.json" 2>/dev/null)
rm -f "$notes".*
if [[ $end == finished || ( $code == %(done)s && -z $end ) ]]; then note finished; exit %(done)s; fi
if [[ $code == %(bad_input)s || $signal == REFUSED ]]; then note refused; exit %(bad_input)s; fi
if [[ $end == failed ]]; then note failed; exit %(failed)s; fi
if [[ $signal == USR2 || $end == preempted ]]; then note preempted; requeue; fi
# When a rank dies, srun sends TERM to the others: who was first, and how it died, tells that from a real one.
crashed=0
if [[ $signal == FAILED ]] || ((code > 128 && code != 143)); then crashed=1; fi
if [[ $terminated == 1 || ( $crashed == 0 && ( -n $signal || $end == terminated || $code == 143 ) ) ]]; then
  note stopped
  [[ -z $range ]] || requeue
  wait_to_be_killed
fi
note crashed
if (($(steps crashed | wc -l) > %(max_requeues)s)); then
  echo "error: $run has crashed more than %(max_requeues)s times (exit code $code); see $run/logs" >&2
  note gave_up
  exit %(failed)s
fi
requeue
"""
