"""Conversion between formats: behind `regrow-ckpt export` and `import`, and with the reference's argument order.

`python -m regrow.launch.commands.convert from-hf IN OUT --model_name llama3 --model_flavor 8B`, and `to-hf IN OUT …`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from regrow.checkpoint.convert.average import AveragedSource
from regrow.checkpoint.convert.conversion_plan import plan_safetensors, plan_step, plan_torch, size_in_bytes
from regrow.checkpoint.convert.convert import CastSource, ConversionResult, convert
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.tensor_source import TensorSource
from regrow.checkpoint.load.initial_load import check_types, moments_of, plan_load, stored_step, weights_of
from regrow.checkpoint.load.open_source import is_hf_folder
from regrow.checkpoint.sources.hf_mapping import ToHfSource
from regrow.checkpoint.storage.opening import as_storage, is_url
from regrow.errors import ConfigError
from regrow.launch.commands.identify_model import UnknownModelError, model_of, run_folder_of, settings_of_model
from regrow.launch.commands.torchtitan import adamw_of, beside_tensors, manifest_of
from regrow.launch.config.errors import EXPLAINED
from regrow.launch.exit_code import ExitCode
from regrow.launch.run.logs import log_to_console
from regrow.launch.run.versions import software_versions
from regrow.launch.run.weights import OpenedWeights, WeightsSource, buffers_of, open_weights, shapes_of
from regrow.models.config import DecoderConfig, ModelConfig
from regrow.models.torchtitan import todays_keys
from regrow.trainer.bars import showing
from regrow.trainer.hf_folder import HfExport, export_hf

__all__ = [
    "ConversionRequest",
    "add_conversions",
    "average_checkpoints",
    "buffers_beside",
    "export_checkpoint",
    "import_checkpoint",
    "main",
    "under_our_names",
]

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionRequest:
    """What is to be converted, from what into what.

    Attributes:
        checkpoint: a step, a run, a Hugging Face folder or a file; a path or URL.
        out: a new or empty folder, or a new file.
        format: of what is written by an export; of what is read by an import, which finds it out where it is None.
        dtype: of the floating-point weights; theirs where it is None.
        model: a variant of `conf/model`, where the checkpoint does not say of which model it is, or is wrong.
        overrides: `model.FIELD=VALUE` of that variant.
        threads: that read and write.
        max_shard_size: of a file of a Hugging Face folder, as in `5GB`.
        hf_assets_path: a folder whose config and tokenizer files are taken over.
        shows_progress: a bar on a terminal, lines elsewhere.
    """

    checkpoint: str
    out: Path
    format: str | None = None
    dtype: torch.dtype | None = None
    model: str | None = None
    overrides: tuple[str, ...] = ()
    threads: int = 2
    max_shard_size: str = "5GB"
    hf_assets_path: Path | None = None
    shows_progress: bool = True

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "ConversionRequest":
        """Of `export`'s or `import`'s command line."""
        request = cls(
            checkpoint=args.checkpoint,
            out=args.out,
            format=args.format,
            dtype=_dtype(args.dtype),
            model=args.model,
            overrides=tuple(args.override),
            threads=args.threads,
            shows_progress=not args.json,
        )
        if args.command != "export":
            return request
        return replace(request, max_shard_size=args.max_shard_size, hf_assets_path=args.hf_assets_path)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def under_our_names(place: str) -> TensorSource:
    """Any checkpoint under our names.

    Raises:
        ConfigError: it cannot be read, or is of a model that we do not have.
    """
    storage = as_storage(place)
    opened = open_weights(storage, _model_or_none(place))
    return _without(opened.source, opened.same)


def buffers_beside(place: str) -> set[str]:
    """What a Hugging Face folder's model has beside parameters, under our names; nothing for other checkpoints."""
    if not is_hf_folder(as_storage(place)):
        return set()
    return buffers_of(model_of(place, None))


def _model(request: ConversionRequest) -> ModelConfig:
    return model_of(request.checkpoint, request.model, request.overrides)


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
    mean = command("average", "the mean weights of several checkpoints, as a step")
    mean.add_argument("checkpoints", nargs="+", metavar="checkpoint", help="steps, runs, folders, files of one model")
    mean.add_argument("-o", "--out", type=Path, required=True, help="a new or empty folder")
    mean.add_argument("--weights", type=float, nargs="+", metavar="W", help="of each, in their order; alike without")
    mean.add_argument("--decay", type=float, metavar="D", help="each counts D times the one after it")
    mean.set_defaults(format=None)
    for parser in (out, back, mean):
        parser.add_argument("--dtype", choices=DTYPES, help="of the floating-point weights; theirs without it")
        parser.add_argument("--model", help="a variant like llama3_8b, where the checkpoint does not say or is wrong")
        parser.add_argument(
            "--override", action="append", default=[], metavar="model.FIELD=VALUE", help="of that variant; repeatable"
        )
        parser.add_argument("--threads", type=int, default=2)


def export_checkpoint(request: ConversionRequest) -> ConversionResult:
    """`regrow-ckpt export`.

    Raises:
        ConfigError: one sentence.
    """
    _check(request)
    needs_model = request.format in ("hf", "torchtitan")
    config = _model(request) if needs_model else _model_or_none(request.checkpoint, request.model, request.overrides)
    opened = open_weights(as_storage(request.checkpoint), config)
    with opened.source as source, _progress(request) as progress:
        if config is not None:
            check_fit(opened, config)
        if request.format == "hf":
            assert config is not None
            return _export_hf(request, source, config, progress)
        if request.format == "torchtitan":
            assert config is not None
            return _export_torchtitan(request, source, config, progress)
        return convert(
            _cast(WeightsSource(source), request),
            plan_torch
            if request.format == "torch"
            else lambda infos, _work: plan_safetensors(infos, max_shard_bytes=None, small={}),
            request.out,
            identity={"from": source.place, "format": request.format},
            threads=request.threads,
            progress=progress,
        )


def _export_hf(
    request: ConversionRequest, source: TensorSource, config: ModelConfig, progress: Callable[[int, int], None]
) -> ConversionResult:
    export = HfExport(
        config=config,
        dtype=request.dtype,
        max_shard_bytes=size_in_bytes(request.max_shard_size, "--max-shard-size"),
        assets=_assets(request.hf_assets_path, config),
        tokenizer=_tokenizer(source.place),
    )
    return export_hf(source, request.out, export, threads=request.threads, progress=progress)


def _export_torchtitan(
    request: ConversionRequest, source: TensorSource, config: ModelConfig, progress: Callable[[int, int], None]
) -> ConversionResult:
    """A DCP folder under torchtitan's names of today, with the optimizer's state where there is one.

    It is one of our steps all the same, so that it is verified wherever we read it.
    """
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"--format torchtitan must be of a decoder, but {config.name} is none; use --format torch")
    shapes, names = shapes_of(config), set(source.infos)
    moments = [m for n in shapes for m in moments_of(n)]
    whole = names.issuperset(moments) and request.dtype is None
    step = stored_step(source)
    kept = [n for n in (*shapes, *sorted(buffers_of(config)), *(moments if whole else ())) if n in names]
    titans = ToHfSource(source, todays_keys(config, kept))
    place = as_storage(request.checkpoint)
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
        _cast(titans, request),
        lambda infos, _work: plan_step(infos, manifest, objects=objects),
        request.out,
        identity={"from": source.place, "format": "torchtitan", "model": json.dumps(manifest.model)},
        threads=request.threads,
        progress=progress,
    )


def _cast(source: TensorSource, request: ConversionRequest) -> TensorSource:
    return source if request.dtype is None else CastSource(source, request.dtype)


def import_checkpoint(request: ConversionRequest) -> ConversionResult:
    """`regrow-ckpt import`.

    Raises:
        ConfigError: one sentence.
    """
    _check(request)
    place = as_storage(request.checkpoint)
    config = _model(request) if is_hf_folder(place) or request.model else None
    opened = open_weights(place, config)
    with opened.source as ours, _progress(request) as progress:
        if request.format is not None and (request.format == "hf") is not opened.in_hf:
            raise ConfigError(
                f"--format must be {'hf' if opened.in_hf else 'that of IN'} for {request.checkpoint}, but is "
                f"{request.format}; leave it out"
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
            _cast(_without(WeightsSource(ours), opened.same), request),
            lambda infos, _work: plan_step(infos, manifest),
            request.out,
            identity={"from": ours.place, "format": "step", "model": json.dumps(manifest.model)},
            threads=request.threads,
            progress=progress,
        )


def average_checkpoints(
    places: Sequence[str], shares: Sequence[float], request: ConversionRequest
) -> ConversionResult:
    """`regrow-ckpt average`: a step of the mean weights, of the model that the first checkpoint is of.

    Args:
        places: checkpoints, of any formats.
        shares: of each.
        request: where it goes; its checkpoint is the first of the places.

    Raises:
        ConfigError: one sentence.
    """
    _check(request)
    config = _model_or_none(request.checkpoint, request.model, request.overrides)
    with ExitStack() as held:
        sources: list[TensorSource] = []
        for place in places:
            opened = open_weights(as_storage(place), config)
            held.callback(opened.source.close)
            if config is not None:
                check_fit(opened, config)
            sources.append(_without(WeightsSource(opened.source), opened.same))
        mean = AveragedSource(sources, shares)
        manifest = Manifest(
            step=0,
            lineage="average",
            kind="model",
            model=settings_of_model(config) if config is not None else {},
            versions=software_versions(),
        )
        parts = json.dumps([[source.place, share] for source, share in zip(sources, shares, strict=True)])
        with _progress(request) as progress:
            return convert(
                _cast(mean, request),
                lambda infos, _work: plan_step(infos, manifest),
                request.out,
                identity={"from": parts, "format": "average", "model": json.dumps(manifest.model)},
                threads=request.threads,
                progress=progress,
            )


def _without(source: TensorSource, names: Collection[str]) -> TensorSource:
    """Without copies of other tensors."""
    source.infos = {n: info for n, info in source.infos.items() if n not in names}
    return source


def check_fit(opened: OpenedWeights, config: ModelConfig) -> None:
    """Whether a checkpoint holds a model's tensors, all of them, in their shapes, and no more.

    Raises:
        ConfigError: it does not.
    """
    source, shapes = opened.source, shapes_of(config)
    plan = plan_load(source, shapes, unused=opened.unused, beside=(*opened.same, *buffers_of(config)))
    remedy = f"give the --model that it is of, which {config.name} is not"
    if plan.missing:
        raise ConfigError(
            f"{source.place} must hold {plan.missing[0]}, but does not ({len(plan.missing)} of {len(shapes)} are "
            f"missing); {remedy}"
        )
    if plan.unused:
        raise ConfigError(
            f"{source.place} holds {plan.unused[0]}, which the model does not have ({len(plan.unused)} such names); "
            f"{remedy}"
        )
    for name in plan.resized:
        raise ConfigError(
            f"{name} in {source.place} has shape {source.infos[name].shape}, but the model's has {shapes[name]}; "
            f"{remedy}"
        )


def _check(request: ConversionRequest) -> None:
    if request.threads < 1:
        raise ConfigError(f"--threads must be at least 1, but is {request.threads}; use 2")
    if is_url(str(request.out)) or str(request.out).startswith(("s3:/", "gs:/", "memory:/")):
        raise ConfigError(f"OUT must be a local path, but is {request.out}; write it here and copy it")


def _assets(given: Path | None, config: ModelConfig) -> Path | None:
    if given is not None:
        if not (given / "config.json").is_file():
            raise ConfigError(
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
def _progress(request: ConversionRequest) -> Iterator[Callable[[int, int], None]]:
    """Tells how far it is, unless nobody wants to know."""
    with showing("converting", quiet=not request.shows_progress) as bar:
        yield bar.update if bar is not None else lambda _done, _total: None


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
    request = ConversionRequest(
        checkpoint=args.checkpoint,
        out=args.out,
        format="hf",
        dtype=_dtype(args.dtype),
        model=_flavour(args.model_name, args.model_flavor),
        hf_assets_path=args.hf_assets_path,
    )
    try:
        result = import_checkpoint(request) if args.command == "from-hf" else export_checkpoint(request)
    except (*EXPLAINED, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ExitCode.bad_input)
    print(f"wrote {result.out}: {result.tensors} tensors, verified")


if __name__ == "__main__":
    main()
