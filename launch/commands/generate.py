"""`regrow-generate`: continues texts, or talks, with the model of any checkpoint."""

import argparse
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from regrow.errors import ConfigError
from regrow.launch.commands.ending import end_with
from regrow.launch.commands.model_options import add_model_options
from regrow.launch.exit_code import ExitCode

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrow-generate", description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="a run (its newest step), a step, or a Hugging Face folder; a path or URL")
    add("-p", "--prompt", action="append", default=[], metavar="TEXT", help="a text to continue; may be repeated")
    add("--file", type=Path, help='prompts: a .jsonl file of {"prompt": …}, or a text with one in each line')
    add("--chat", action="store_true", help="turns by the chat template; without a prompt, a talk on the terminal")
    add("--system", metavar="TEXT", help="the system's turn, with --chat")
    add("--max-tokens", type=int, default=128, metavar="N", help="added to each prompt at most; 128")
    add("--temperature", type=float, default=0.7, metavar="T", help="0 takes the likeliest token; 0.7")
    add("--top-k", type=int, default=0, metavar="K", help="the likeliest tokens that may be drawn; 0 is all")
    add("--top-p", type=float, default=1.0, metavar="P", help="the part of the probability that may be drawn; 1")
    add("--min-p", type=float, default=0.0, metavar="P", help="the least, as a part of the likeliest token's; 0")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="of tokens that occurred; 1 is none")
    add("--stop", action="append", default=[], metavar="TEXT", help="a text that ends one and is no part of it")
    add("--seed", type=int, default=0, help="of the draws; 0")
    add("--logprobs", type=int, metavar="N", help="with --json: of each token and of N others")
    add("--batch-size", type=int, default=16, metavar="N", help="prompts together; 0 is all; 16")
    add_model_options(parser)
    add("--json", action="store_true", help="print one JSON value: a list of completions")
    return parser


def main() -> None:
    """The command's entry; exit code 2 for bad input."""
    args = _parser().parse_args()
    end_with(lambda: _run(args), as_json=args.json)


def _run(args: argparse.Namespace) -> ExitCode:
    prompts = [*args.prompt, *_prompts_of(args.file)]
    if not prompts and not args.chat:
        raise ConfigError("a prompt must be given (-p TEXT or --file FILE), but there is none; or talk with --chat")
    if args.system is not None and not args.chat:
        raise ConfigError("--system must stand beside --chat, but that is not given; add it")
    if not prompts and args.json:
        raise ConfigError("--json must stand beside a prompt, but there is none; give -p TEXT")
    # torch takes seconds to import, and what is refused here does without.
    speak = import_module("regrow.launch.commands.generate_texts").run
    code: ExitCode = import_module("regrow.launch.commands.command_ranks").on_ranks(
        args, "regrow.launch.commands.generate", lambda ranks: speak(args, prompts, ranks)
    )
    return code


def _prompts_of(file: Path | None) -> Iterator[str]:
    """One per line of a file.

    Raises:
        ConfigError: a line of a .jsonl file is no prompt.
    """
    if file is None:
        return
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--file must be a text that can be read, but {file} cannot ({reason}); check it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield line
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str):
            raise ConfigError(
                f'--file must hold {{"prompt": TEXT}} in each line, but line {number} of {file} does not; mend it'
            )
        yield prompt


if __name__ == "__main__":
    main()
