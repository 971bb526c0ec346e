"""How the small commands end."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from regrow.launch.commands.ending import end_with
from regrow.launch.config.errors import UserError
from regrow.launch.exit_code import ExitCode


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_seen_enough_is_no_error(lines: int) -> None:
    program = f"""
    from regrow.launch.commands.ending import end_with
    import time
    time.sleep(0.2)
    end_with(lambda: [print("x" * 80) for _ in range({lines})] and 0)
    """
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=write, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write)
        os.close(read)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (141, "")


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_one_line(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise UserError("run.name must be a name, but is 3; use another")

    with pytest.raises(SystemExit) as ended:
        end_with(work, as_json=as_json)
    out, said = capsys.readouterr()
    assert ended.value.code == ExitCode.bad_input
    assert said == "error: run.name must be a name, but is 3; use another\n"
    assert (json.loads(out) if as_json else out) == ({"error": said[7:-1]} if as_json else "")
