"""Training and saving for `benchmarks.gpu`: each function runs in a process of its own."""

import dataclasses
import gc
import json
import logging
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_profile import Watch
from benchmarks.plain_llama import PlainLlama, Shape, make_step
from regrow.checkpoint.save.saver import StepSaver
from regrow.launch.config.composition import compose_config
from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.ownership import own_run
from regrow.launch.run.prepare import prepare_run
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.start import open_spec
from regrow.trainer.device import pin_threads
from regrow.trainer.hook import Hook
from regrow.trainer.parallel.context import close_parallel, open_parallel
from regrow.trainer.start_marks import begin, mark

__all__ = ["Job", "Report", "train", "train_part", "write_corpus"]

Report = Callable[..., None]

_TINY_DENSE = ["model=llama3_debug", "model.dim=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2",
               "model.ffn_dim=64", "model.vocab_size=320"]  # fmt: skip
_TINY_MOE = ["model=qwen3_moe_debug", "model.dim=32", "model.n_layers=2", "model.vocab_size=320"]
# The smallest layers are multiplied in 8 bits too.
_TINY_FP8 = ["precision.fp8_min_features=0"]
# On a CPU: Inductor takes half a minute a model there.
_TINY = ["data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=2", "launch.device=cpu",
         "launch.kernels=plain", "train.compile_backend=aot_eager"]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a part's process is given.

    Attributes:
        tiny: tiny sizes, on a CPU.
        folder: for runs, the corpus and its tokens.
    """

    tiny: bool
    folder: Path

    def overrides(self, model: Sequence[str], seq_len: int, rows: int) -> list[str]:
        """The command of a run with this model and batch, or of a tiny one in its place."""
        corpus = ["data=text", f"data.files=[{self.folder / 'text.jsonl'}]", f"data.cache={self.folder / 'cache'}",
                  "data.tokenizer_vocab_size=300", "data.workers=1", "hooks=none",
                  f"run.root={self.folder / 'runs'}"]  # fmt: skip
        if self.tiny:
            small = _TINY_MOE if any("moe" in m for m in model) else _TINY_DENSE
            return [*small, *(m for m in model if not m.startswith("model")), *corpus, *_TINY]
        sizes = [f"data.seq_len={seq_len}", f"data.micro_batch_size={rows}", f"data.global_batch_size={rows}"]
        return [*model, *corpus, *sizes]


def write_corpus(path: Path, documents: int) -> None:
    """Text of random words, the same each time."""
    rng = random.Random(7)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(400)]
    with path.open("w") as out:
        for _ in range(documents):
            out.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(20, 400)))}) + "\n")


class _Log(logging.Handler):
    """What a run logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(overrides: Sequence[str], name: str, *watching: Hook) -> list[str]:
    """Trains a run in this process, as the command would; returns what it logged."""
    begin()
    handler = _Log()
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        config = compose_config([*overrides, f"run.name={name}"])
        run_dir = Path(config.run.root, name).absolute()
        run_dir.mkdir(parents=True, exist_ok=True)
        spec = prepare_run(config, run_dir, overrides=overrides)
        mark("config and checks")
        with own_run(spec.config, spec.run_dir) as ticket:
            spec = dataclasses.replace(spec, ticket=ticket, record=open_spec(spec).record)
            threads = pin_threads(spec.config.launch.threads_per_rank, 1)
            context = open_parallel(spec.layout, spec.device_type, 300.0)
            try:
                trainer = compose_trainer(spec, context, StopFlag(), threads)
                mark("model and data")
                trainer.hooks += watching
                trainer.fit()
            finally:
                close_parallel()
    finally:
        root.removeHandler(handler)
    return handler.lines


def speed(watch: Watch) -> dict[str, Any]:
    """Medians over the second half of a run, in which nothing is compiled any more."""
    rows = watch.rows
    steady = rows[len(rows) // 2 :]
    mfu = [r["mfu"] for r in steady if r["mfu"] is not None]
    both = statistics.median(mfu) if mfu else None
    return {
        "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in steady)),
        "step_time_s": round(statistics.median(r["step_time_s"] for r in steady), 4),
        "mfu_6n_12ldt": both,
        "mfu_6n": None if both is None else both * watch.flops_ratio,
        "memory_gib": round(rows[-1]["memory_gib"], 2),
        "first_step_s": round(rows[0]["step_time_s"], 2),
        "loss_first": rows[0]["loss"],
        "loss_last": rows[-1]["loss"],
    }


def train_part(job: Job, report: Report, name: str, model: Sequence[str], seq_len: int, rows: int, steps: int,
               ladder: Sequence[Sequence[str]] = ((),)) -> None:  # fmt: skip
    """Reports how fast a model trains.

    Args:
        job: sizes and places.
        report: takes what was found.
        name: of the run.
        model: overrides.
        seq_len: tokens of a sequence.
        rows: sequences of a step.
        steps: of the run.
        ladder: further overrides, of which the first that fit into memory are taken.
    """
    for number, more in enumerate(ladder):
        watch = Watch()
        overrides = [*job.overrides(model, seq_len, rows), "checkpoint=disabled", f"train.steps={steps}", *more]
        try:
            train(overrides, f"{name}-{number}", watch)
        except torch.OutOfMemoryError:
            if number + 1 == len(ladder):
                raise
            report(**{f"out_of_memory_{number}": " ".join(more) or "as it is"})
        else:
            report(options=" ".join([*model, *more]), **speed(watch))
            return
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


_BASE = ["model=llama3_1b", "precision=bf16"]


def one_b(job: Job, report: Report) -> None:
    """1B at 2,048 tokens, compiled: speed, a profile, saves with pinned memory, a restart from the last of them."""
    _with_saves(job, report, "pinned", profiled=True)


def save_async(job: Job, report: Report) -> None:
    """The same saves with `async`, whose call copies."""
    _with_saves(job, report, "async", profiled=False)


def _with_saves(job: Job, report: Report, policy: str, *, profiled: bool) -> None:
    """Trains past three saves, each after the one before is durable; the later two are made in warm memory."""
    interval = 6 if job.tiny else 48
    steps, name = 3 * interval, f"save-{policy}"
    overrides = [*job.overrides(_BASE, 2048, 8), f"checkpoint={policy}", f"checkpoint.interval={interval}",
                 "checkpoint.keep_latest_k=2", f"scheduler.total_steps={2 * steps}"]  # fmt: skip
    overrides += ["train.compile=true"] if job.tiny else []
    watch, copies = Watch(interval - 1 if profiled else 0), _Copies()
    copies.install()
    lines = train([*overrides, f"train.steps={steps}"], name, watch)
    before = watch.rows[interval // 2 : interval - 2]
    steady = Watch()
    steady.rows, steady.flops_ratio = [*before, *before], watch.flops_ratio
    ends = {"loss_first": watch.rows[0]["loss"], "loss_last": watch.rows[-1]["loss"]}
    report(**{**speed(steady), **ends, "first_step_s": round(watch.rows[0]["step_time_s"], 2)})
    report(start=_start(lines), profile=watch.profile, save=_save(watch, lines, interval, copies))
    _free()
    again = Watch()
    began = time.perf_counter()
    lines = train([*overrides, f"train.steps={steps + 4}"], name, again)
    report(restart={"start": _start(lines), "whole_s": round(time.perf_counter() - began, 2)})


def _start(lines: Sequence[str]) -> str:
    """The line that says how long a start took, and what of it was loading (`state`)."""
    return next((line for line in lines if line.startswith("first step ")), "not logged")


def _save(watch: Watch, lines: Sequence[str], interval: int, copies: "_Copies") -> dict[str, Any]:
    usual = statistics.median(r["step_time_s"] for r in watch.rows[interval // 2 : interval - 2])
    text = "\n".join(lines)

    def lost(first: int, last: int) -> float:
        return float(round(sum(max(0.0, r["step_time_s"] - usual) for r in watch.rows[first:last]), 3))

    return {
        "calls_ms": [float(ms) for ms in re.findall(r"saving step \d+ \(.*\): ([\d.]+) ms", text)],
        "durable_s": [float(s) for s in re.findall(r"durable after ([\d.]+) s", text)],
        "usual_step_s": round(usual, 4),
        "lost_s_first": lost(interval, 2 * interval),
        "lost_s_second": lost(2 * interval, 3 * interval),
        "slowest_step_s": round(max(r["step_time_s"] for r in watch.rows[interval:]), 4),
        "copies": copies.found(),
    }


class _Copies:
    """Times the copies of snapshots from a GPU, in its own stream; on a CPU there are none."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any, int]] = []

    def install(self) -> None:
        """From now on, in this process."""
        spans = self._spans

        def queue(saver: StepSaver, image: Any, tensors: Any) -> Any:
            stream = torch.cuda.Stream(saver._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(saver._device))
            begun, copied = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                begun.record(stream)
                image.copy_from(tensors)
                copied.record(stream)
            spans.append((begun, copied, image.plan.total_bytes))
            return copied

        StepSaver._queue_copies = queue  # type: ignore[method-assign, assignment]

    def found(self) -> list[dict[str, float]] | str:
        """Of each snapshot its size, and how fast it came."""
        if not self._spans:
            return "none: there is no GPU"
        found = []
        for begun, copied, size in self._spans:
            copied.synchronize()
            seconds = begun.elapsed_time(copied) / 1e3
            gib = size / 2**30
            found.append(
                {"pinned_gib": round(gib, 3), "seconds": round(seconds, 3), "gib_per_s": round(gib / seconds, 1)}
            )
        return found


def eager(job: Job, report: Report) -> None:
    """1B at 2,048 tokens, not compiled."""
    train_part(job, report, "1b-eager", [*_BASE, "train.compile=false"], 2048, 8, 8)


def plain_peer(job: Job, report: Report) -> None:
    """1B as one would write it in plain PyTorch, compiled as a whole."""
    shape = Shape(vocab_size=320, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64) if job.tiny else Shape()
    length = 32 if job.tiny else 2048
    device = torch.device("cuda" if torch.cuda.is_available() and not job.tiny else "cpu")
    with device:
        model = PlainLlama(shape, length)
    _peer(job, report, model, shape.vocab_size, length, device)


def transformers_peer(job: Job, report: Report) -> None:
    """1B in `transformers`, compiled as a whole."""
    try:
        import transformers
    except ImportError as error:
        report(not_run=f"transformers cannot be imported here ({error})")
        return
    s = Shape(vocab_size=320, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64) if job.tiny else Shape()
    length = 32 if job.tiny else 2048
    device = torch.device("cuda" if torch.cuda.is_available() and not job.tiny else "cpu")
    config = transformers.LlamaConfig(
        vocab_size=s.vocab_size, hidden_size=s.dim, intermediate_size=s.ffn_dim, num_hidden_layers=s.n_layers,
        num_attention_heads=s.n_heads, num_key_value_heads=s.n_kv_heads, max_position_embeddings=length,
        tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with device:
        model = _WithLoss(transformers.LlamaForCausalLM(config))
    report(version=str(transformers.__version__))
    _peer(job, report, model, s.vocab_size, length, device)


class _WithLoss(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.model(input_ids=tokens, labels=labels, shift_labels=labels).loss


def _peer(
    job: Job, report: Report, model: torch.nn.Module, vocabulary: int, length: int, device: torch.device
) -> None:
    rows, steps = (2, 3) if job.tiny else (8, 12)
    # A tiny run is there to find mistakes; Inductor takes half a minute on a CPU.
    step = make_step(model, device, compiled=not job.tiny)
    torch.manual_seed(1)
    given = torch.randint(0, vocabulary, (rows, length + 1), device=device)
    tokens, labels = given[:, :-1].contiguous(), given[:, 1:].contiguous()
    times, loss = [], 0.0
    for _ in range(steps):
        began = time.perf_counter()
        loss = float(step(tokens, labels))
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[steps // 2 :])
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    report(tokens_per_s=round(rows * length / seconds), step_time_s=round(seconds, 4), loss_last=loss,
           memory_gib=memory and round(memory, 2), first_step_s=round(times[0], 2))  # fmt: skip


def _layers_of_8b(job: Job, bytes_per_parameter: int, activations_per_layer: float, most: int) -> int:
    """As many of Llama 3 8B's 32 layers as fit into the card's memory."""
    if job.tiny or not torch.cuda.is_available():
        return 2
    free = 0.9 * torch.cuda.get_device_properties(0).total_memory - 16e9 - 1.05e9 * bytes_per_parameter
    return max(1, min(most, int(free / (218e6 * bytes_per_parameter + activations_per_layer))))


_FITS = ((), ("train.activation_checkpoint=selective",), ("train.activation_checkpoint=full",))


def eight_b_bf16_params(job: Job, report: Report) -> None:
    """Layers of 8B at 4,096 tokens × 4, parameters and optimizer state in bfloat16."""
    layers = _layers_of_8b(job, 8, 1.5e9, 32)
    report(layers=layers)
    model = ["model=llama3_8b", f"model.n_layers={layers}", "precision=bf16_params"]
    train_part(job, report, "8b-params", model, 4096, 4, 6 if job.tiny else 8, _FITS[1:])


def eight_b_bf16(job: Job, report: Report) -> None:
    """Layers of 8B at 4,096 tokens × 4, float32 masters."""
    _eight_b(job, report, "bf16")


def eight_b_fp8(job: Job, report: Report) -> None:
    """The same layers with products in float8."""
    _eight_b(job, report, "fp8")


def _eight_b(job: Job, report: Report, precision: str) -> None:
    layers = _layers_of_8b(job, 16, 2.2e9, 12)
    report(layers=layers)
    model = ["model=llama3_8b", f"model.n_layers={layers}", f"precision={precision}"]
    model += _TINY_FP8 if job.tiny and precision == "fp8" else []
    train_part(job, report, f"8b-{precision}", model, 4096, 4, 6 if job.tiny else 10, _FITS)


def whole_8k(job: Job, report: Report) -> None:
    """1B at 8,192 tokens × 2, attention over whole sequences."""
    train_part(job, report, "1b-8k-whole", _BASE, 8192, 2, 10)


def documents_8k(job: Job, report: Report) -> None:
    """1B at 8,192 tokens × 2, attention within documents."""
    train_part(job, report, "1b-8k-documents", [*_BASE, "data.document_mask=true"], 8192, 2, 10)


def moe(job: Job, report: Report) -> None:
    """Three layers of Qwen3 30B-A3B (128 experts, 8 for each token) at 4,096 tokens × 2."""
    model = ["model=qwen3_moe_30b_a3b", "model.n_layers=3", "precision=bf16"]
    train_part(job, report, "moe", model, 4096, 2, 8, _FITS)


def three_b(job: Job, report: Report) -> None:
    """Llama 3.2 3B at 4,096 tokens × 4."""
    train_part(job, report, "3b", ["model=llama3_3b", "precision=bf16"], 4096, 4, 8, _FITS)


def offloaded(job: Job, report: Report) -> None:
    """1B at 2,048 tokens with the optimizer's state on the host."""
    train_part(job, report, "1b-offload", [*_BASE, "train.offload_optimizer=true"], 2048, 8, 10)


def budgets(job: Job, report: Report) -> None:
    """1B at 8,192 tokens × 2 with each way to recompute: memory and speed."""
    for name, more in (
        ("selective", ["train.activation_checkpoint=selective"]),
        ("full", ["train.activation_checkpoint=full"]),
        ("budget", ["train.activation_checkpoint=budget", "train.activation_memory_budget=0.5"]),
    ):
        _free()
        found: dict[str, Any] = {}
        train_part(job, lambda found=found, **values: found.update(values), f"1b-{name}", [*_BASE, *more], 8192, 2, 6)
        report(**{name: found})
