"""Everything of torch's that is private, or not the same in all versions that Regrow runs with (2.11 and 2.13 today).

It lies beside the rooms and below all of them, so that models, checkpoint and trainer may each import it without
importing each other; it imports torch alone. Whoever moves to another torch reads this file first.

What loads torch's compiler, which takes a second, is imported inside the functions that need it: a run on one rank
that compiles nothing does without.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = [
    "FakeTensorMode",
    "StorageInfo",
    "StridedShard",
    "all_gather",
    "attention_operators",
    "can_compile",
    "causal_lower_right",
    "clear_sharding_cache",
    "cpu_attention",
    "cpu_attention_backward",
    "default_store",
    "dump_memory_snapshot",
    "efficient_attention",
    "efficient_attention_backward",
    "flash_attention",
    "flash_attention_backward",
    "flight_record",
    "foreach_add",
    "foreach_copy",
    "foreach_divide",
    "foreach_norm",
    "functional_collectives",
    "gather_into",
    "grouped_product",
    "has_hooks",
    "hosted_like",
    "is_in_backward",
    "make_compiler_repeatable",
    "memory_by_category",
    "on_out_of_memory",
    "onednn_linear",
    "overlap_tensor_parallel",
    "pipelining",
    "process_group",
    "reduce_scatter",
    "remember_allocations",
    "scaled_product",
    "scatter_into",
    "set_activation_budget",
    "set_micro_batches",
    "silu_gradient",
    "softmax_gradient",
    "splits_backward",
    "varlen_attention",
    "view_of_nothing_else",
]

_aten: Any = torch.ops.aten

# Attention by kernel, with the logarithm of the sum of exponents among the results: nothing public gives it.
cpu_attention: Any = _aten._scaled_dot_product_flash_attention_for_cpu
cpu_attention_backward: Any = _aten._scaled_dot_product_flash_attention_for_cpu_backward
flash_attention: Any = _aten._scaled_dot_product_flash_attention
flash_attention_backward: Any = _aten._scaled_dot_product_flash_attention_backward
efficient_attention: Any = _aten._scaled_dot_product_efficient_attention
efficient_attention_backward: Any = _aten._scaled_dot_product_efficient_attention_backward
# A product of factors in 8 bits with their scales.
scaled_product: Any = _aten._scaled_mm
# A view whose source nobody else has, so that autograd need not know it as one.
view_of_nothing_else: Any = _aten._unsafe_view
softmax_gradient: Any = torch._softmax_backward_data
# What `grouped_mm` becomes.
grouped_product: Any = _aten._grouped_mm.default
silu_gradient: Any = _aten.silu_backward.default
foreach_norm: Any = torch._foreach_norm
foreach_divide: Any = torch._foreach_div_
foreach_add: Any = torch._foreach_add_
foreach_copy: Any = torch._foreach_copy_

# torch 2.13 has these two under new names and warns of the old ones.
all_gather: Any = (
    getattr(functional_collectives, "all_gather_single", None) or functional_collectives.all_gather_tensor
)
reduce_scatter: Any = (
    getattr(functional_collectives, "reduce_scatter_single", None) or functional_collectives.reduce_scatter_tensor
)


def gather_into(out: Tensor, part: Tensor, group: torch.distributed.ProcessGroup) -> None:
    """Joins the parts of all ranks of the group along the first dimension, into `out`."""
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    gather: Any = getattr(torch.distributed, name)
    gather(out, part, group=group)


def scatter_into(out: Tensor, whole: Tensor, group: torch.distributed.ProcessGroup) -> None:
    """This rank's part, along the first dimension, of the sum over the group of `whole`, into `out`."""
    name = "reduce_scatter_single" if hasattr(torch.distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
    scatter: Any = getattr(torch.distributed, name)
    scatter(out, whole, group=group)


def process_group(name: str) -> torch.distributed.ProcessGroup:
    """The group of a name."""
    # Newer versions have a type of their own for the name.
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group
    group: torch.distributed.ProcessGroup = resolve(name)
    return group


def onednn_linear() -> Any:
    """oneDNN's product of plain tensors; None where this torch has none."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def attention_operators() -> tuple[Any, ...]:
    """What attention becomes, for policies that name operators."""
    import torch.nn.attention.varlen  # registers its operator

    return (
        cpu_attention.default,
        flash_attention.default,
        efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.higher_order.flex_attention,
    )


def varlen_attention(*arguments: Any, **options: Any) -> Tensor:
    """`regrow.torch_varlen.varlen_attention`."""
    from regrow.torch_varlen import varlen_attention as compute

    return compute(*arguments, **options)


def causal_lower_right(queries: int, keys: int) -> Any:
    """A mask for kernels that take no other: the last query sees all keys, each one before it a key less."""
    from torch.nn.attention.bias import causal_lower_right as mask

    return mask(queries, keys)


def pipelining() -> Any:
    """torch.distributed.pipelining, with its schedules."""
    import torch.distributed.pipelining as module

    return module


def is_in_backward() -> bool:
    """Whether a backward pass runs on this thread, for instance one that computes a block again.

    What is compiled has no second pass: the compiler leaves what changes a buffer out of what is computed again.
    """
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody is to be told when the module runs, forward or backward."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, kind) for kind in kinds)


def splits_backward() -> bool:
    """Whether the two halves of a backward pass go through autograd functions of one's own.

    Before torch 2.13 they do not. Names and signatures are the same in both, so the version is all there is to ask.
    """
    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


def can_compile() -> bool:
    """Whether torch.compile finds here what it needs for GPUs: Triton, and a C compiler for Triton's launchers."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    return importlib.util.find_spec("triton") is not None and any(c and shutil.which(c) for c in compilers)


def make_compiler_repeatable() -> None:
    """Has the compiler choose nothing by time that changes roundings."""
    # The compiler is needed here alone, and importing it takes a second.
    from torch._inductor import config as inductor

    inductor.deterministic = True


def set_activation_budget(budget: float) -> None:
    """The part of a compiled region's activations that is kept for its backward pass; 1 keeps all."""
    if functorch.activation_memory_budget != budget:
        # What was compiled in this process under another budget would be used again.
        torch.compiler.reset()
        functorch.activation_memory_budget = budget


def hosted_like(local: Tensor, like: Tensor) -> Tensor:
    """`local` as the same kind of shard as `like`, and where it is; `DTensor.from_local` would move it to the device
    of the mesh.

    Args:
        local: of the local shape of `like`, on a CPU.
        like: a parameter; plain ones give `local` itself.
    """
    if not isinstance(like, DTensor):
        return local
    spec = DTensorSpec(
        like.device_mesh,
        tuple(like.placements),
        tensor_meta=TensorMeta(shape=like.shape, stride=like.stride(), dtype=local.dtype),
    )
    made: Tensor = DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made


def set_micro_batches(schedule: Any, arguments: list[tuple[Tensor, ...]], options: list[dict[str, Any]]) -> None:
    """Gives a pipeline's schedule micro-batches that are cut already; of itself it would cut one large batch."""
    schedule._split_inputs = lambda _args, _kwargs=None: (arguments, options)


def clear_sharding_cache() -> None:
    """Forgets what DTensor remembers of operations, which holds meshes and their process groups."""
    # It loads the compiler.
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()  # type: ignore[no-untyped-call]


def overlap_tensor_parallel(group_name: Any) -> None:
    """Lets the compiler run tensor parallelism's collectives beside its products, on GPUs."""
    # The compiler is needed here alone, and importing it takes a second.
    from torch._inductor import config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(group_name)


def default_store() -> torch.distributed.Store:
    """The store of the default process group."""
    store: torch.distributed.Store = torch.distributed.distributed_c10d._get_default_store()
    return store


def flight_record() -> bytes | None:
    """What NCCL's flight recorder has of this process' collectives, as torch's own tools read it; None without one.

    It may wait for collectives that hang: whoever calls it has done everything else.
    """
    try:
        recorder: Any = torch._C._distributed_c10d
        record: bytes = recorder._dump_nccl_trace()
    except (AttributeError, RuntimeError):
        return None
    return record


def memory_by_category(profiler: torch.profiler.profile) -> list[tuple[str, int]]:
    """Bytes at the peak of a profile, by what they are for, largest first; it must know shapes, stacks and memory."""
    memory: Any = profiler._memory_profile()
    now: dict[str, int] = {}
    total = peak = 0
    at_peak: dict[str, int] = {}
    for _, action, (key, version), size in memory.timeline:
        change = {"PREEXISTING": size, "CREATE": size, "DESTROY": -size}.get(action.name, 0)
        category = memory._categories.get(key, version)
        name = "unknown" if category is None else str(category.name).lower().replace("_", " ")
        now[name] = now.get(name, 0) + change
        total += change
        if total > peak:
            peak, at_peak = total, dict(now)
    return sorted(((n, b) for n, b in at_peak.items() if b > 0), key=lambda item: -item[1])


def remember_allocations(entries: int) -> None:
    """Has the GPU's allocator remember who asked for what; 0 ends that."""
    record: Any = torch.cuda.memory._record_memory_history
    if entries:
        record(max_entries=entries)
    else:
        record(enabled=None)


def dump_memory_snapshot(path: str) -> None:
    """What the GPU's allocator holds, as pytorch.org/memory_viz reads it."""
    dump: Any = torch.cuda.memory._dump_snapshot
    dump(path)


def on_out_of_memory(act: Callable[[], None]) -> None:
    """Has `act` called when a GPU has no memory for an allocation, while all others are still held."""
    binding: Any = torch._C
    binding._cuda_attach_out_of_memory_observer(lambda _device, _wanted, _total, _free: act())
