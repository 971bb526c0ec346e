"""The local launcher's child: one rank, as `python -m regrow.launch.run.worker SPEC`."""

import os
import pickle
import signal
import sys
from pathlib import Path

from regrow.launch.run.acknowledge import Acknowledger, speaks_for_all
from regrow.launch.run.signals import STOP_NOTE, StopFlag
from regrow.trainer.process import PARENT_VARIABLE, die_with_parent, importing

__all__ = ["main"]


def main() -> None:
    """Trains what the spec in the file SPEC says. Exit codes: 0 ended as the stop record tells, 1 failed."""
    flag, spec_file = StopFlag(), Path(sys.argv[1])
    flag.install()
    flag.defer(deferring=True)
    # A signal that came before these handlers stood is written down by the launcher.
    note = spec_file.with_name(STOP_NOTE)
    flag.cause = lambda: int(note.read_text()) if note.exists() else None
    flag.received = flag.cause()
    if speaks_for_all():
        acknowledger = Acknowledger(flag)
        acknowledger.start()
        if flag.received is not None:
            acknowledger.hear(flag.received)
    if PARENT_VARIABLE in os.environ:
        die_with_parent(int(os.environ[PARENT_VARIABLE]))
    # The terminal sends Ctrl-C to the launcher too, which passes it on as TERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with importing():
        # The handlers stand before torch is imported, which takes seconds in which a signal may come.
        from regrow.launch.run.rank import run_as_child

    code = run_as_child(pickle.loads(spec_file.read_bytes()), flag)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of asynchronous collectives can abort the interpreter's ordinary shutdown.
    os._exit(code)


if __name__ == "__main__":
    main()
