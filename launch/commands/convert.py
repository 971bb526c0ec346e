"""Conversion between formats: behind `regrow-ckpt export` and `import`, and with the reference's argument order.

`python -m regrow.launch.commands.convert from-hf IN OUT --model_name llama3 --model_flavor 8B`, and `to-hf IN OUT …`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from regrow.checkpoint.convert.conversion_plan import plan_safetensors, plan_step, plan_torch, size_in_bytes
from regrow.checkpoint.convert.convert import CastSource, ConversionResult, convert
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.tensor_source import TensorSource
from regrow.checkpoint.load.initial_load import check_types, moments_of, plan_load, stored_step, weights_of
from regrow.checkpoint.load.open_source import is_hf_folder
from regrow.checkpoint.sources.hf_mapping import ToHfSource
from regrow.checkpoint.storage.opening import as_storage, is_url
from regrow.launch.commands.identify_model import UnknownModelError, model_of, run_folder_of, settings_of_model
from regrow.launch.commands.torchtitan import adamw_of, beside_tensors, manifest_of
from regrow.launch.run.logs import log_to_console
from regrow.launch.run.versions import software_versions
from regrow.launch.run.weights import OpenedWeights, WeightsSource, buffers_of, open_weights, shapes_of
from regrow.models.config import DecoderConfig, ModelConfig
from regrow.models.torchtitan import todays_keys
from regrow.trainer.hf_folder import HfExport, export_hf

__all__ = ["add_conversions", "buffers_beside", "export_checkpoint", "import_checkpoint", "main", "under_our_names"]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def under_our_names(place: str) -> TensorSource:
    """Any checkpoint under our names.

    Raises:
        ValueError: it cannot be read, or is of a model that we do not have.
    """
    storage = as_storage(place)
    opened = open_weights(storage, _model_or_none(place))
    return _without(opened.source, opened.same)


def buffers_beside(place: str) -> set[str]:
    """What a Hugging Face folder's model has beside parameters, under our names; nothing for other checkpoints."""
    if not is_hf_folder(as_storage(place)):
        return set()
    return buffers_of(model_of(place, None))


def _model(args: argparse.Namespace) -> ModelConfig:
    return model_of(args.checkpoint, args.model, _overrides(args))


def _overrides(args: argparse.Namespace) -> list[str]:
    # The reference's own arguments have none.
    return list(getattr(args, "override", ()))


def _model_or_none(place: str, forced: str | None = None, overrides: Collection[str] = ()) -> ModelConfig | None:
    """The model that a checkpoint is of, None where it does not say."""
    try:
        return model_of(place, forced, overrides)
    except UnknownModelError:
        return None


def add_conversions(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Adds `export` and `import`."""
    out = command("export", "from a checkpoint to a Hugging Face folder or one file; run again after a kill")
    out.add_argument("checkpoint", help="a step, or a run (its newest step); a path or URL")
    out.add_argument("out", type=Path, help="a new or empty folder; a new file with torch and safetensors")
    out.add_argument("--format", choices=("hf", "torch", "safetensors", "torchtitan"), default="hf")
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
        parser.add_argument("--model", help="a variant like llama3_8b, where the checkpoint does not say or is wrong")
        parser.add_argument(
            "--override", action="append", default=[], metavar="model.FIELD=VALUE", help="of that variant; repeatable"
        )
        parser.add_argument("--threads", type=int, default=2)


def export_checkpoint(args: argparse.Namespace) -> ConversionResult:
    """`regrow-ckpt export`.

    Raises:
        ValueError: one sentence.
    """
    _check(args)
    needs_model = args.format in ("hf", "torchtitan")
    config = _model(args) if needs_model else _model_or_none(args.checkpoint, args.model, _overrides(args))
    opened = open_weights(as_storage(args.checkpoint), config)
    with opened.source as source, _progress(args) as progress:
        if config is not None:
            check_fit(opened, config)
        if args.format == "hf":
            assert config is not None
            return _export_hf(args, source, config, progress)
        if args.format == "torchtitan":
            assert config is not None
            return _export_torchtitan(args, source, config, progress)
        return convert(
            _cast(WeightsSource(source), args),
            plan_torch
            if args.format == "torch"
            else lambda infos, _work: plan_safetensors(infos, max_shard_bytes=None, small={}),
            args.out,
            identity={"from": source.place, "format": args.format},
            threads=args.threads,
            progress=progress,
        )


def _export_hf(
    args: argparse.Namespace, source: TensorSource, config: ModelConfig, progress: Callable[[int, int], None]
) -> ConversionResult:
    export = HfExport(
        config=config,
        dtype=_dtype(args),
        max_shard_bytes=size_in_bytes(args.max_shard_size, "--max-shard-size"),
        assets=_assets(args.hf_assets_path, config),
        tokenizer=_tokenizer(source.place),
    )
    return export_hf(source, args.out, export, threads=args.threads, progress=progress)


def _export_torchtitan(
    args: argparse.Namespace, source: TensorSource, config: ModelConfig, progress: Callable[[int, int], None]
) -> ConversionResult:
    """A DCP folder under torchtitan's names of today, with the optimizer's state where there is one.

    It is one of our steps all the same, so that it is verified wherever we read it.
    """
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"--format torchtitan must be of a decoder, but {config.name} is none; use --format torch")
    shapes, names = shapes_of(config), set(source.infos)
    moments = [m for n in shapes for m in moments_of(n)]
    whole = names.issuperset(moments) and args.dtype is None
    step = stored_step(source)
    kept = [n for n in (*shapes, *sorted(buffers_of(config)), *(moments if whole else ())) if n in names]
    titans = ToHfSource(source, todays_keys(config, kept))
    place = as_storage(args.checkpoint)
    stored = manifest_of(place)
    train_state = stored.train_state if whole and stored is not None else {}
    manifest = Manifest(
        step=step or 0,
        lineage="export",
        kind="full" if whole else "model",
        train_state=train_state,
        model=settings_of_model(config),
        versions=software_versions(),
    )
    objects = beside_tensors(titans.infos, step or 0, train_state, adamw_of(place)) if whole else {}
    return convert(
        _cast(titans, args),
        lambda infos, _work: plan_step(infos, manifest, objects=objects),
        args.out,
        identity={"from": source.place, "format": "torchtitan", "model": json.dumps(manifest.model)},
        threads=args.threads,
        progress=progress,
    )


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    return getattr(torch, args.dtype) if args.dtype else None


def _cast(source: TensorSource, args: argparse.Namespace) -> TensorSource:
    dtype = _dtype(args)
    return source if dtype is None else CastSource(source, dtype)


def import_checkpoint(args: argparse.Namespace) -> ConversionResult:
    """`regrow-ckpt import`.

    Raises:
        ValueError: one sentence.
    """
    _check(args)
    place = as_storage(args.checkpoint)
    config = _model(args) if is_hf_folder(place) or args.model else None
    opened = open_weights(place, config)
    with opened.source as ours, _progress(args) as progress:
        if args.format is not None and (args.format == "hf") is not opened.in_hf:
            raise ValueError(
                f"--format must be {'hf' if opened.in_hf else 'that of IN'} for {args.checkpoint}, but is "
                f"{args.format}; leave it out"
            )
        if config is not None:
            check_fit(opened, config)
        check_types(ours, [n for n in weights_of(ours) if n.endswith("weight")])
        manifest = Manifest(
            step=0,
            lineage="import",
            kind="model",
            model=settings_of_model(config) if config is not None else {},
            versions=software_versions(),
        )
        return convert(
            _cast(_without(WeightsSource(ours), opened.same), args),
            lambda infos, _work: plan_step(infos, manifest),
            args.out,
            identity={"from": ours.place, "format": "step", "model": json.dumps(manifest.model)},
            threads=args.threads,
            progress=progress,
        )


def _without(source: TensorSource, names: Collection[str]) -> TensorSource:
    """Without copies of other tensors."""
    source.infos = {n: info for n, info in source.infos.items() if n not in names}
    return source


def check_fit(opened: OpenedWeights, config: ModelConfig) -> None:
    """Whether a checkpoint holds a model's tensors, all of them, in their shapes, and no more.

    Raises:
        ValueError: it does not.
    """
    source, shapes = opened.source, shapes_of(config)
    plan = plan_load(source, shapes, unused=opened.unused, beside=(*opened.same, *buffers_of(config)))
    remedy = f"give the --model that it is of, which {config.name} is not"
    if plan.missing:
        raise ValueError(
            f"{source.place} must hold {plan.missing[0]}, but does not ({len(plan.missing)} of {len(shapes)} are "
            f"missing); {remedy}"
        )
    if plan.unused:
        raise ValueError(
            f"{source.place} holds {plan.unused[0]}, which the model does not have ({len(plan.unused)} such names); "
            f"{remedy}"
        )
    for name in plan.resized:
        raise ValueError(
            f"{name} in {source.place} has shape {source.infos[name].shape}, but the model's has {shapes[name]}; "
            f"{remedy}"
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
    """`python -m regrow.launch.commands.convert`, with the reference's arguments. Exit codes: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m regrow.launch.commands.convert", description=__doc__)
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
