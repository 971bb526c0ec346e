"""`regrow explain [NAME …]`: what a field, a section or a group means."""

from regrow.launch.exit_code import ExitCode

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """The command's entry; returns the exit code."""
    return ExitCode.done
