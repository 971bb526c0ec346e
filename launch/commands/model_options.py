"""How the commands that compute with a model say which one and where; nothing here imports torch."""

import argparse

__all__ = ["add_model_options"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--tokenizer`, `--dtype` and `--device`, as `open_on` takes them, and `--tp` and `--ranks`."""
    parser.add_argument("--tokenizer", metavar="DIR", help="where the checkpoint has none beside it")
    parser.add_argument("--dtype", choices=_DTYPES, help="of weights and computation; as stored")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …; a GPU where there is one")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that hold one model together; 1")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="processes to start here; as many as --tp, or those of torchrun or srun",
    )
