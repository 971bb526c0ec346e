"""Conversion between formats: behind `regrow-ckpt export` and `import`, and with the reference's argument order.

`python -m launch.convert from-hf IN OUT --model_name llama3 --model_flavor 8B`, and `to-hf IN OUT …`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from checkpoint.convert import CastSource, ConversionResult, convert
from checkpoint.manifest import Manifest
from checkpoint.mapped import ForwardSource
from checkpoint.outputs import plan_safetensors, plan_step, plan_torch, size_in_bytes
from checkpoint.partial import weights_of
from checkpoint.source import Box, TensorInfo, TensorSource
from checkpoint.sources import is_hf_folder, open_source
from checkpoint.storage.opening import as_storage, is_url
from launch.models_known import model_of, run_folder_of, settings_of_model
from launch.targets import resolve_target
from launch.worker import log_to_console, software_versions
from models.config import ModelConfig
from models.hf import family_of
from trainer.hf_folder import HfExport, export_hf

__all__ = ["add_conversions", "buffers_of", "export_checkpoint", "import_checkpoint", "main", "under_our_names"]

DTYPES = ("float32", "bfloat16", "float16", "float64")


@final
class WeightsSource(TensorSource):
    """A checkpoint's weights, without what lies beside them."""

    def __init__(self, source: TensorSource) -> None:
        self.place = source.place
        self._source = source
        self.infos: Mapping[str, TensorInfo] = {n: source.infos[n] for n in weights_of(source)}

    def read(self, name: str, box: Box) -> Tensor:
        return self._source.read(name, box)

    def close(self) -> None:
        self._source.close()


def under_our_names(place: str, forced: str | None = None) -> TensorSource:
    """Any checkpoint under our names.

    Raises:
        ValueError: it cannot be read, or is of a model that we do not have.
    """
    if not is_hf_folder(as_storage(place)):
        return open_source(place)
    config = model_of(place, forced)
    return ForwardSource(open_source(place), family_of(config).keys(config))


def buffers_of(place: str) -> set[str]:
    """What a Hugging Face folder's model has beside parameters, under our names; nothing for other checkpoints."""
    if not is_hf_folder(as_storage(place)):
        return set()
    config = model_of(place, None)
    with torch.device("meta"):
        model = resolve_target(config._target_, "model")(config)
    return set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}


def add_conversions(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Adds `export` and `import`."""
    out = command("export", "from a checkpoint to a Hugging Face folder or one file; run again after a kill")
    out.add_argument("checkpoint", help="a step, or a run (its newest step); a path or URL")
    out.add_argument("out", type=Path, help="a new or empty folder; a new file with torch and safetensors")
    out.add_argument("--format", choices=("hf", "torch", "safetensors"), default="hf")
    out.add_argument("--max-shard-size", default="5GB", help="of a file, with hf")
    out.add_argument("--hf-assets-path", type=Path, help="a folder whose config and tokenizer files are taken over")
    back = command("import", "from a Hugging Face folder or a file to a checkpoint; run again after a kill")
    back.add_argument(
        "checkpoint", metavar="in", help="a Hugging Face folder, a .safetensors or .pt file, a DCP folder"
    )
    back.add_argument("out", type=Path, help="a new or empty folder")
    back.add_argument("--format", choices=("hf", "torch", "safetensors", "dcp"), help="of IN; found out without it")
    for parser in (out, back):
        parser.add_argument("--dtype", choices=DTYPES, help="of the floating-point weights; theirs without it")
        parser.add_argument("--model", help="a flavour like llama3_8b, where the checkpoint does not say or is wrong")
        parser.add_argument("--threads", type=int, default=2)


def export_checkpoint(args: argparse.Namespace) -> ConversionResult:
    """`regrow-ckpt export`.

    Raises:
        ValueError: one sentence.
    """
    _check(args)
    dtype: torch.dtype | None = getattr(torch, args.dtype) if args.dtype else None
    source: TensorSource = WeightsSource(open_source(args.checkpoint))
    with source, _progress(args) as progress:
        if args.format == "hf":
            config = model_of(args.checkpoint, args.model)
            export = HfExport(
                config=config,
                dtype=dtype,
                max_shard_bytes=size_in_bytes(args.max_shard_size, "--max-shard-size"),
                assets=_assets(args.hf_assets_path, config),
                tokenizer=_tokenizer(source.place),
            )
            return export_hf(source, args.out, export, threads=args.threads, progress=progress)
        source = CastSource(source, dtype) if dtype is not None else source
        return convert(
            source,
            plan_torch
            if args.format == "torch"
            else lambda infos, _work: plan_safetensors(infos, max_shard_bytes=None, small={}),
            args.out,
            identity={"from": source.place, "format": args.format},
            threads=args.threads,
            progress=progress,
        )


def import_checkpoint(args: argparse.Namespace) -> ConversionResult:
    """`regrow-ckpt import`.

    Raises:
        ValueError: one sentence.
    """
    _check(args)
    place, in_hf = args.checkpoint, is_hf_folder(as_storage(args.checkpoint))
    if args.format is not None and (args.format == "hf") is not in_hf and as_storage(place).names():
        raise ValueError(
            f"--format must be {'hf' if in_hf else 'that of IN'} for {place}, but is {args.format}; leave it out"
        )
    config = model_of(place, args.model) if in_hf or args.model else None
    source: TensorSource
    if in_hf:
        assert config is not None
        source = ForwardSource(open_source(place), family_of(config).keys(config))
        _check_unused(source)
    else:
        source = WeightsSource(open_source(place))
    if args.dtype:
        source = CastSource(source, getattr(torch, args.dtype))
    manifest = Manifest(
        step=0,
        lineage="import",
        kind="model",
        model=settings_of_model(config) if config is not None else {},
        versions=software_versions(),
    )
    with source, _progress(args) as progress:
        return convert(
            source,
            lambda infos, _work: plan_step(infos, manifest),
            args.out,
            identity={"from": source.place, "format": "step", "model": json.dumps(manifest.model)},
            threads=args.threads,
            progress=progress,
        )


def _check_unused(source: ForwardSource) -> None:
    extra = [n for n in source.unused if n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise ValueError(
            f"{source.place} holds {extra[0]}, which the model of its config.json does not have ({len(extra)} such "
            "names); the folder is of another model"
        )


def _check(args: argparse.Namespace) -> None:
    if args.threads < 1:
        raise ValueError(f"--threads must be at least 1, but is {args.threads}; use 2")
    if is_url(str(args.out)) or str(args.out).startswith(("s3:/", "gs:/", "memory:/")):
        raise ValueError(f"OUT must be a local path, but is {args.out}; write it here and copy it")


def _assets(given: Path | None, config: ModelConfig) -> Path | None:
    if given is not None:
        if not (given / "config.json").is_file():
            raise ValueError(
                f"--hf-assets-path must be a folder with config.json, but {given} is not; check the path"
            )
        return given
    path = Path(config.hf_assets_path).expanduser() if config.hf_assets_path else None
    return path if path is not None and path.is_dir() else None


def _tokenizer(place: str) -> Path | None:
    run = run_folder_of(as_storage(place))
    file = run / "tokenizer.json" if run is not None else None
    return file if file is not None and file.is_file() else None


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; nothing elsewhere, nor with --json."""
    if getattr(args, "json", False) or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _flavour(name: str | None, flavor: str | None) -> str | None:
    """`llama3` and `8B` as the name of our YAML, `llama3_8b`."""
    if name is None or flavor is None:
        return None
    size = flavor.lower().replace(".", "_").replace("-", "_")
    return f"{name}_{'debug' if size == 'debugmodel' else size}"


def main() -> None:
    """`python -m launch.convert`, with the reference's arguments. Exit codes: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m launch.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("from-hf", "Hugging Face to a checkpoint"), ("to-hf", "a checkpoint to Hugging Face")):
        made = commands.add_parser(name, help=text)
        made.add_argument("checkpoint", metavar="input_dir")
        made.add_argument("out", metavar="output_dir", type=Path)
        made.add_argument("--model_name", help="as in llama3")
        made.add_argument("--model_flavor", help="as in 8B; without both it is found out")
        made.add_argument("--hf_assets_path", type=Path)
        made.add_argument("--export_dtype", dest="dtype", choices=DTYPES)
    args = parser.parse_args()
    log_to_console()
    args.model, args.threads, args.max_shard_size = _flavour(args.model_name, args.model_flavor), 2, "5GB"
    args.format = "hf"
    try:
        result = import_checkpoint(args) if args.command == "from-hf" else _to_hf(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {result.out}: {result.tensors} tensors, verified")


def _to_hf(args: argparse.Namespace) -> ConversionResult:
    return export_checkpoint(args)


if __name__ == "__main__":
    main()
