"""Schemas of the loop, the layout, the optimizer, precision and logging."""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from omegaconf import MISSING

__all__ = [
    "ActivationCheckpoint",
    "AdamWConfig",
    "ContextMethod",
    "Float8Recipe",
    "HookConfig",
    "HookStage",
    "OptimizerConfig",
    "ParallelConfig",
    "PipelineSchedule",
    "PrecisionConfig",
    "PrecisionName",
    "SchedulerConfig",
    "TrainConfig",
    "WandbConfig",
    "WandbMode",
]


class ActivationCheckpoint(Enum):
    """What the backward pass recomputes: nothing, all but matrix products, whole blocks, or what a budget says."""

    none = "none"
    selective = "selective"
    full = "full"
    budget = "budget"


class PrecisionName(Enum):
    """What is computed in, and what parameters and optimizer state are.

    `fp32` computes in float32, `bf16` in bfloat16, `fp8` multiplies in 8 bits and does the rest in bfloat16, each
    with parameters, reduction of gradients and optimizer state in float32. `bf16_params` has parameters and optimizer
    state in bfloat16 too, rounded stochastically. `fp64` is for checking numerics: everything is float64.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"
    bf16_params = "bf16_params"
    fp8 = "fp8"


class Float8Recipe(Enum):
    """Over what a scale of `precision=fp8` reaches: a whole tensor (faster), or a row (finer)."""

    tensorwise = "tensorwise"
    rowwise = "rowwise"


class PipelineSchedule(Enum):
    """In which order stages work; the names that torch.distributed.pipelining knows."""

    one_f_one_b = "1F1B"
    gpipe = "GPipe"
    interleaved = "Interleaved1F1B"
    interleaved_zero_bubble = "InterleavedZeroBubble"
    zbv_zero_bubble = "ZBVZeroBubble"


class ContextMethod(Enum):
    """How attention sees the whole sequence: exchanging heads, joining keys and values, or passing them on in a ring.

    `auto` exchanges heads where their number allows, and joins keys and values elsewhere.
    """

    auto = "auto"
    ulysses = "ulysses"
    gather = "gather"
    ring = "ring"


class WandbMode(Enum):
    """Weights & Biases' own modes."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Degrees; their product is the number of ranks.

    Attributes:
        dp_replicate: copies of the (sharded) model.
        dp_shard: ranks that share one copy's parameters, gradients and optimizer state (FSDP2); -1 takes
            the ranks that remain.
        tp: tensor parallel.
        pp: pipeline parallel.
        cp: context parallel.
        ep: expert parallel, borrowed from dp_shard · cp · tp.
        sequence_parallel: with tp, activations between the matrices are cut along the sequence.
        async_tp: with tp, matrix products overlap their collectives; on GPUs, with train.compile.
        cp_method: see `ContextMethod`.
        cp_balance: a rank holds a piece from the front of each sequence and one from its back.
        pp_schedule: see `PipelineSchedule`.
        pp_stages_per_rank: stages on each rank; 0 takes 1, or 2 with schedules that need several.
        pp_layers: layers of each stage, in order; empty spreads them evenly.
        pp_input_weight: what the embedding counts, in layers, when they are spread.
        pp_output_weight: what the output layer and the loss count.
        reshard_after_forward: whether ranks that share parameters give up what they gathered between the forward and
            the backward pass: `auto` does so in all blocks without a pipeline, and nowhere with one; `true` and
            `false` everywhere and nowhere; a number of ranks keeps the parameters shared among so many meanwhile.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("parallel", "parallel_schema")

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = True
    async_tp: bool = False
    cp_method: ContextMethod = ContextMethod.auto
    cp_balance: bool = True
    pp_schedule: PipelineSchedule = PipelineSchedule.one_f_one_b
    pp_stages_per_rank: int = 0
    pp_layers: list[int] = field(default_factory=list)
    pp_input_weight: int = 1
    pp_output_weight: int = 1
    reshard_after_forward: bool | int | str = "auto"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The loop.

    Attributes:
        steps: optimizer steps in total, over all restarts.
        grad_clip: largest global gradient norm; 0 leaves gradients alone.
        activation_checkpoint: `none`, `selective` (keep matrix products), `full` (recompute blocks), `budget`.
        activation_memory_budget: with `budget`, the part of the activations that is kept, from 0 (as `full`) to 1 (as
            `none`). Compiled blocks recompute what is cheapest; without compilation so many blocks are kept whole.
        offload_optimizer: keep the optimizer's state in the host's memory, and bring it to the device in each step.
        compile: torch.compile each block: `true`, `false`, or `auto`, which compiles on GPUs.
        compile_backend: for `compile`.
        deterministic: torch's deterministic algorithms; on a GPU, training then repeats bit for bit.
        log_every: steps between lines of progress where there is no terminal; the log's file has every step.
        z_loss: what the squared logarithm of the sum of exponents of a position's logits counts beside its loss
            (PaLM, arXiv:2204.02311, section 5, where it is 1e-4); losses are reported without it. 0 for none.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("train", "train_schema")

    steps: int = 1000
    grad_clip: float = 1.0
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint.none
    activation_memory_budget: float = 0.5
    offload_optimizer: bool = False
    compile: bool | str = "auto"
    compile_backend: str = "inductor"
    deterministic: bool = False
    log_every: int = 10
    z_loss: float = field(default=0.0, metadata={"since": "0.2.0"})


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """An optimizer; a subclass per kind.

    Attributes:
        lr: the schedule's highest learning rate.
        weight_decay: decoupled, on matrices alone (not on norms and embeddings).
    """

    _target_: str = MISSING
    lr: float = MISSING
    weight_decay: float = 0.1


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    SCHEMA: ClassVar[tuple[str, str]] = ("optimizer", "adamw_schema")

    _target_: str = "regrow.trainer.optimizer.AdamW"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8


@dataclass(kw_only=True, slots=True)
class SchedulerConfig:
    """A learning-rate schedule; a subclass per shape.

    Attributes:
        warmup_steps: linear from 0; where it does not leave a step for the decay, the schedule's first tenth.
        total_steps: where the schedule ends; null takes `train.steps` of the run's first start and keeps it;
            `run.extend` says what raising `train.steps` later does.
        min_lr_ratio: the end of the schedule, as a part of `optimizer.lr`; it holds from there on.
    """

    _target_: str = MISSING
    warmup_steps: int = 100
    total_steps: int | None = None
    min_lr_ratio: float = 0.1


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """See `PrecisionName`.

    Attributes:
        fp8_recipe: see `Float8Recipe`.
        fp8_min_features: with fp8, linear layers with fewer features in or out stay in bfloat16: to scale a small
            matrix takes longer than its product saves.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("precision", "precision_schema")

    name: PrecisionName = PrecisionName.fp32
    fp8_recipe: Float8Recipe = field(default=Float8Recipe.tensorwise, metadata={"since": "0.2.0"})
    fp8_min_features: int = field(default=1024, metadata={"since": "0.2.0"})


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases, with `logger=wandb`.

    Attributes:
        mode: `offline` writes below the run's directory and sends nothing.
        project: W&B's project.
        entity: W&B's team or user; null is the account's own.
        group: runs shown together; null is the sweep's name in a sweep.
        tags: free words.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("wandb", "wandb_schema")

    mode: WandbMode = WandbMode.offline
    project: str = "regrow"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


class HookStage(Enum):
    """Where a hook stands among the others, in this order; within a stage, the order is that of the config."""

    begin = "begin"
    measure = "measure"
    write = "write"
    log = "log"
    record = "record"
    save = "save"
    end = "end"


@dataclass(kw_only=True, slots=True)
class HookConfig:
    """A part of the loop; a subclass per hook.

    Attributes:
        _target_: the hook's class, called with this config.
        enabled: false leaves it out.
        stage: see `HookStage`; what measures comes before what writes rows, and that before what saves.
    """

    _target_: str = MISSING
    enabled: bool = True
    stage: HookStage = HookStage.measure
