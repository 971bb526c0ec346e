"""`regrow explain [NAME …]`: what a field, a section, a group or a choice means; without a name, all of them."""

import argparse
import json
import pydoc
import signal
import sys

from regrow.launch.commands.ending import exit_code_of
from regrow.launch.commands.explain_name import explain_all, explain_name
from regrow.launch.commands.explain_text import as_page
from regrow.launch.commands.own_catalog import whole_catalog
from regrow.launch.exit_code import ExitCode

__all__ = ["main"]

_EXAMPLES = """
  regrow explain optimizer.lr           a field
  regrow explain lr                     every field of that name
  regrow explain checkpoint             a section with its choices
  regrow explain model=llama3_debug     a choice, and what it sets
  regrow explain hook/evaluation        the same, as its file is named
  regrow explain | grep tokens          everything, as text
"""


def main(arguments: list[str]) -> int:
    """The command's entry; returns the exit code, `bad_input` where nothing has a given name.

    Args:
        arguments: those after `explain`.
    """
    parser = argparse.ArgumentParser(
        prog="regrow explain",
        description="Says what a field, a section, a group or a choice means; without a name, all of them.",
        epilog=f"examples:{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="a field, a section, a group, or GROUP=CHOICE")
    parser.add_argument("--json", action="store_true", help="for programs: one list of objects")
    given = parser.parse_args(arguments)
    return exit_code_of(lambda: _explain(given.names, as_json=given.json), as_json=given.json)


def _explain(names: list[str], *, as_json: bool) -> int:
    catalog = whole_catalog()
    found = [e for name in names for e in explain_name(catalog, name)] if names else explain_all(catalog)
    if as_json:
        print(json.dumps(found, indent=2))
    elif names or not (sys.stdin.isatty() and sys.stdout.isatty()):
        print(as_page(found), end="")
    else:
        # The pager is of this terminal too, and knows what Ctrl-C means to it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        pydoc.pager(as_page(found))
    return ExitCode.done
