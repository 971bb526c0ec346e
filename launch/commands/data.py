"""`regrow-data`: makes and shows tokenised corpora."""

import argparse
import logging
import os
from pathlib import Path

from regrow.checkpoint.scratch import clear_dead_scratch
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
from regrow.trainer.data.token_store import INDEX, TokenStore

__all__ = ["main"]

log = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrow-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("tokenize", help="text files to a folder for data=tokens; run again to resume")
    make.add_argument("out", type=Path, help="the folder to make")
    make.add_argument(
        "files",
        nargs="*",
        help=".txt, .jsonl(.gz/.zst) and .parquet files and globs; none: the standard library",
    )
    make.add_argument("--field", default="text", help="the text's field in .jsonl and .parquet")
    make.add_argument("--txt-document-bytes", type=int, default=16384, help="0 leaves a .txt file whole")
    make.add_argument("--tokenizer", help="tokenizer.json or its folder; none trains a BPE")
    make.add_argument("--vocab-size", type=int, default=4096, help="of that BPE")
    make.add_argument("--eos-token", help="the token between documents")
    make.add_argument("--workers", type=int, default=0, help="processes; 0 is one per core")
    show = commands.add_parser("show", help="what a folder holds")
    show.add_argument("folder", type=Path)
    return parser


def _source(args: argparse.Namespace) -> CorpusSource:
    common = {
        "tokenizer": args.tokenizer,
        "tokenizer_vocab_size": args.vocab_size,
        "eos_token": args.eos_token,
        "workers": args.workers,
    }
    if not args.files:
        return StdlibSource(StdlibConfig(**common))
    text = TextConfig(files=args.files, field=args.field, txt_document_bytes=args.txt_document_bytes, **common)
    return TextSource(text)


def _tokenize(args: argparse.Namespace) -> None:
    if args.workers < 0:
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


def _show(folder: Path) -> None:
    index = TokenStore(folder).index
    print(
        f"{index.documents:,} documents, {index.tokens:,} tokens in {index.shards} shards, "
        f"vocabulary {index.vocab_size:,}"
    )
    print(f"fingerprint {index.fingerprint}")


def main() -> None:
    """The command's entry; exit code 2 for bad input."""
    log_to_console()
    args = _parser().parse_args()
    end_with(lambda: _run(args))


def _run(args: argparse.Namespace) -> ExitCode:
    if args.command == "tokenize":
        clear_dead_scratch()
        _tokenize(args)
        _show(args.out)
    else:
        _show(args.folder)
    return ExitCode.done


if __name__ == "__main__":
    main()
