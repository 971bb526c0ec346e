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
    """What the backward pass recomputes instead of keeping it.

    Attributes:
        none: nothing; fastest, and needs the most memory.
        selective: everything but the results of matrix products.
        full: whole blocks; needs the least memory, and about a third more computing.
        budget: as much as `train.activation_memory_budget` asks for.
    """

    none = "none"
    selective = "selective"
    full = "full"
    budget = "budget"


class PrecisionName(Enum):
    """What is computed in, and what parameters and optimizer state are.

    Attributes:
        fp32: everything is float32.
        bf16: computes in bfloat16; parameters, reduction of gradients and optimizer state are float32.
        fp64: everything is float64, to check numerics.
        bf16_params: computes in bfloat16; parameters and optimizer state are bfloat16 too, rounded stochastically.
        fp8: multiplies in 8 bits and computes the rest in bfloat16; parameters, reduction of gradients and optimizer
            state are float32.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"
    bf16_params = "bf16_params"
    fp8 = "fp8"


class Float8Recipe(Enum):
    """Over what a scale of `precision=fp8` reaches.

    Attributes:
        tensorwise: a whole tensor; faster.
        rowwise: one row; finer.
    """

    tensorwise = "tensorwise"
    rowwise = "rowwise"


class PipelineSchedule(Enum):
    """In which order stages work; the values are the names that torch.distributed.pipelining knows.

    Attributes:
        one_f_one_b: one forward and one backward pass in turn; needs at least as many micro-batches as stages.
        gpipe: all forward passes, then all backward passes; any number of micro-batches, and the most memory.
        interleaved: as `one_f_one_b`, with several stages on each rank; less waiting.
        interleaved_zero_bubble: as `interleaved`, with the weights' gradients computed while ranks would wait.
        zbv_zero_bubble: two stages on each rank in the shape of a V (ZB-V, arXiv:2401.10241).
    """

    one_f_one_b = "1F1B"
    gpipe = "GPipe"
    interleaved = "Interleaved1F1B"
    interleaved_zero_bubble = "InterleavedZeroBubble"
    zbv_zero_bubble = "ZBVZeroBubble"


class ContextMethod(Enum):
    """How attention sees the whole sequence.

    Attributes:
        auto: `ulysses` where the number of heads allows it, else `gather`.
        ulysses: ranks exchange heads, so that each has some heads of the whole sequence.
        gather: each rank gathers the keys and values of the whole sequence.
        ring: keys and values are passed on from rank to rank.
    """

    auto = "auto"
    ulysses = "ulysses"
    gather = "gather"
    ring = "ring"


class WandbMode(Enum):
    """Weights & Biases' own modes.

    Attributes:
        offline: writes below the run's directory and sends nothing.
        online: sends to W&B's server while the run goes on.
        disabled: does nothing.
    """

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Degrees; their product is the number of ranks.

    Attributes:
        dp_replicate: copies of the (sharded) model, each of which is given other data.
        dp_shard: ranks that share one copy's parameters, gradients and optimizer state (FSDP2); -1 takes
            the ranks that remain.
        tp: tensor parallel: ranks that share each matrix product; 1 for none.
        pp: pipeline parallel: ranks that share the layers out; 1 for none.
        cp: context parallel: ranks that share each sequence; 1 for none.
        ep: expert parallel: ranks that share the experts out, borrowed from dp_shard · cp · tp; 1 for none.
        sequence_parallel: with tp, activations between the matrices are cut along the sequence.
        async_tp: with tp, matrix products overlap their collectives; on GPUs, with train.compile.
        cp_method: with cp, how attention sees the whole sequence.
        cp_balance: with cp, so that all have as much to do, a rank holds a piece from the front of each sequence and
            one from its back.
        pp_schedule: with pp, in which order stages work.
        pp_stages_per_rank: stages on each rank; 0 takes 1, or 2 with schedules that need several.
        pp_layers: layers of each stage, in order; empty spreads them evenly.
        pp_input_weight: what the embedding counts, in layers, when they are spread.
        pp_output_weight: what the output layer and the loss count, in layers.
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
        activation_checkpoint: what the backward pass recomputes to save memory.
        activation_memory_budget: with `budget`, the part of the activations that is kept, from 0 (as `full`) to 1 (as
            `none`). Compiled blocks recompute what is cheapest; without compilation so many blocks are kept whole.
        offload_optimizer: keep the optimizer's state in the host's memory, and bring it to the device in each step.
        compile: torch.compile each block: `true`, `false`, or `auto`, which compiles on GPUs.
        compile_backend: torch.compile's backend, with `compile`.
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
        _target_: the optimizer's class, called with this config.
        lr: the schedule's highest learning rate.
        weight_decay: decoupled weight decay, on matrices alone (not on norms and embeddings); 0 for none.
    """

    _target_: str = MISSING
    lr: float = MISSING
    weight_decay: float = 0.1


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Attributes:
        beta1: decay of the running mean of gradients.
        beta2: decay of the running mean of squared gradients.
        eps: added to the root of the squares' mean, so that nothing is divided by 0.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("optimizer", "adamw_schema")

    _target_: str = "regrow.trainer.optimizer.AdamW"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8


@dataclass(kw_only=True, slots=True)
class SchedulerConfig:
    """A learning-rate schedule; a subclass per shape.

    Attributes:
        _target_: the schedule's class, called with this config.
        warmup_steps: steps in which the rate rises linearly from 0; where it does not leave a step for the decay, the
            schedule's first tenth.
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
    """The types that are computed and kept in.

    Attributes:
        name: what is computed in, and what parameters and optimizer state are.
        fp8_recipe: with fp8, over what a scale reaches.
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
        mode: where W&B writes and sends.
        project: W&B's project.
        entity: W&B's team or user; null is the account's own.
        group: runs shown together; null is the sweep's name in a sweep.
        tags: words to find runs by, as you like.
        diff_bytes: how much of the uncommitted changes of your own repository, the one that the command is given in,
            goes with the run; 0 for none of it.
        samples: the texts of the hook `sample`, as tables.
        picture: a picture of the loss at the end.
        artifacts: each checkpoint, as an artifact that refers to where it lies; nothing of it is sent.
        alerts: a message when the run fails or is preempted.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("wandb", "wandb_schema")

    mode: WandbMode = WandbMode.offline
    project: str = "regrow"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    diff_bytes: int = 1_000_000
    samples: bool = True
    picture: bool = True
    artifacts: bool = False
    alerts: bool = True


class HookStage(Enum):
    """Where a hook stands among the others, in this order; within a stage, the order is that of the config.

    Attributes:
        begin: before all others.
        measure: adds numbers to the step's row of metrics.
        write: writes rows and samples to files, and lines to the console.
        log: sends rows elsewhere.
        record: keeps the run's own history.
        save: saves the run's state.
        end: after all others.
    """

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
        stage: where it stands among the others; what measures comes before what writes rows, and that before what
            saves.
    """

    _target_: str = MISSING
    enabled: bool = True
    stage: HookStage = HookStage.measure
