"""`regrow-data`: makes and shows tokenised corpora, and what a run reads of them."""

import argparse
import json
import logging
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from regrow.checkpoint.scratch import clear_dead_scratch
from regrow.launch.commands.data_show import count_store, figures_text, summary
from regrow.launch.commands.ending import end_with
from regrow.launch.exit_code import ExitCode
from regrow.launch.run.logs import log_to_console
from regrow.trainer.data.cache import writing_to
from regrow.trainer.data.config import StdlibConfig, TextConfig
from regrow.trainer.data.prepare import complete_store, only_one
from regrow.trainer.data.recipe import RECIPE
from regrow.trainer.data.source import CorpusSource, DataError
from regrow.trainer.data.stdlib import StdlibSource
from regrow.trainer.data.text import TextSource
from regrow.trainer.data.token_store import INDEX

__all__ = ["main"]

log = logging.getLogger(__name__)

# Of `tokenize`, by the names of their fields; and those that only files have.
_OF_FILES = ("field", "txt_document_bytes")
_OPTIONS = (*_OF_FILES, "tokenizer", "tokenizer_vocab_size", "eos_token", "bos_token", "workers")
_OVERRIDE = re.compile(r"[+~]{0,2}(data|data_source|seed)(@[\w.]+|\.[\w.@]+)?=")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrow-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("tokenize", help="text files to a folder for data=tokens; run again to resume")
    make.add_argument("out", type=Path, help="the folder to make")
    make.add_argument(
        "files",
        nargs="*",
        help="files and globs as data.files has them; none: the standard library. Or overrides of `regrow` for its "
        "data, for instance data=chat data.files=[chats.jsonl] data.tokenizer=DIR",
    )
    make.add_argument("--field", help="the text's field in records; text")
    make.add_argument("--txt-document-bytes", type=int, help="0 leaves a .txt file whole; 16384")
    make.add_argument("--tokenizer", help="tokenizer.json or its folder; none trains a BPE")
    make.add_argument("--vocab-size", dest="tokenizer_vocab_size", type=int, help="of that BPE; 4096")
    make.add_argument("--eos-token", help="the token after each document")
    make.add_argument("--bos-token", help="the token before each document; none")
    make.add_argument("--workers", type=int, help="processes; 0 is one per core; 0")
    show = commands.add_parser("show", help="what a folder holds: documents, tokens, bytes per token, lengths")
    show.add_argument("folder", type=Path)
    show.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the documents' lengths into a .png, .svg or .pdf"
    )
    show.add_argument(
        "--validation-fraction", type=float, default=0.05, metavar="F", help="what a run would hold out"
    )
    show.add_argument("--json", action="store_true", help="print one JSON value")
    _add_of_a_run(commands)
    return parser


def _add_of_a_run(commands: Any) -> None:
    """The commands that take a run's overrides: whatever is no flag, in any order with the flags."""
    takes = {"epilog": "OVERRIDES are those of `regrow`: FIELD=VALUE, GROUP=CHOICE."}
    look = commands.add_parser(
        "preview", help="samples that a run would read, decoded", usage="%(prog)s [-h] [flags] OVERRIDES…", **takes
    )
    look.add_argument("--count", type=int, default=3, metavar="N", help="samples that are shown; 3")
    look.add_argument("--first", type=int, default=0, metavar="SAMPLE", help="samples of the run before them; 0")
    mix = commands.add_parser(
        "mix", help="what a run takes of each source, by stage", usage="%(prog)s [-h] [flags] OVERRIDES…", **takes
    )
    mix.add_argument("--json", action="store_true", help="print one JSON value")
    for command in (look, mix):
        command.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder of configs beside Regrow's own")


def _source(args: argparse.Namespace) -> CorpusSource:
    given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    overrides = [a for a in args.files if _OVERRIDE.match(a)]
    if overrides:
        if given or len(overrides) < len(args.files):
            other = next(iter(set(args.files) - set(overrides)), None) or f"--{next(iter(given)).replace('_', '-')}"
            raise DataError(
                f"overrides must say everything about the data, but {other} stands beside {overrides[0]}; give it as "
                "an override too (data.files=[…], data.tokenizer=DIR)"
            )
        # What composes a config imports torch, which takes seconds and files by themselves do without.
        of_run: CorpusSource = import_module("regrow.launch.commands.data_run").composed_source(overrides)
        return of_run
    if not args.files:
        given = {name: value for name, value in given.items() if name not in _OF_FILES}
        return StdlibSource(StdlibConfig(**given))
    return TextSource(TextConfig(files=args.files, **given))


def _tokenize(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 0:
        raise DataError(f"--workers must be at least 0, but is {args.workers}; use 0")
    source = _source(args)
    source.check()
    out: Path = args.out
    with writing_to(out, "OUT"):
        out.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(out / RECIPE) and any(p.name != ".lock" for p in out.iterdir()):
            made = (out / INDEX).exists() or (out / "corpus.txt").exists()
            held = "was made by a version that did not note its options" if made else "is not"
            raise DataError(f"OUT must be an empty folder, but {out} {held}; choose another one")
        with only_one(out):
            complete_store(source, out)


def _show(args: argparse.Namespace) -> None:
    figures = count_store(args.folder, args.validation_fraction)
    if args.plot is not None:
        # Drawing takes half a second to import.
        import_module("regrow.launch.commands.data_plot").plot_lengths(figures, args.plot)
    print(json.dumps(figures.as_json()) if args.json else "\n".join(figures_text(figures)))


def _mix(args: argparse.Namespace) -> None:
    config, data_mix = _composed(args), import_module("regrow.launch.commands.data_mix")
    use = data_mix.mix_of(config)
    print(json.dumps(use.as_json()) if args.json else "\n".join(data_mix.mix_text(use)))


def _preview(args: argparse.Namespace) -> None:
    config, data_preview = _composed(args), import_module("regrow.launch.commands.data_preview")
    data_preview.print_preview(config, first=args.first, count=args.count)


def _composed(args: argparse.Namespace) -> Any:
    # What checks a run imports torch, which takes seconds and the other commands do without.
    return import_module("regrow.launch.commands.data_run").composed(args.overrides, args.config_dir)


def main() -> None:
    """The command's entry; exit code 2 for bad input."""
    parser = _parser()
    args, overrides = parser.parse_known_args()
    # A field that is set with dashes has a sentence of its own.
    unknown = [a for a in overrides if a.startswith("-") and "." not in a]
    if unknown or (overrides and args.command not in ("preview", "mix")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}")
    args.overrides = overrides
    log_to_console()
    end_with(lambda: _run(args), as_json=getattr(args, "json", False))


def _run(args: argparse.Namespace) -> ExitCode:
    if args.command == "tokenize":
        clear_dead_scratch()
        _tokenize(args)
        print("\n".join(summary(args.out)))
    elif args.command == "show":
        _show(args)
    elif args.command == "mix":
        _mix(args)
    else:
        _preview(args)
    return ExitCode.done


if __name__ == "__main__":
    main()
