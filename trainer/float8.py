"""Linear layers that multiply in 8 bits, by torchao's float8 (https://github.com/pytorch/ao); loaded where chosen.

Each factor of a product is scaled to the range of its 8-bit format by the largest value that it holds at that moment,
so there is no state: checkpoints and names are those of the layers that were converted. The weights stay as they are,
and so do embedding, norms, output layer, routers, and the stacked weights of experts.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.distributed_utils import tensor_already_casted_to_fp8
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

from regrow.models.base import LanguageModel
from regrow.models.moe import Router
from regrow.trainer.config import Float8Recipe, PrecisionConfig
from regrow.trainer.parallel.tensor import mix_in
from regrow.trainer.shards import like_parameter, local_part

__all__ = ["convert_linears", "gather_in_float8"]

# What the products of tensor cores ask of every dimension.
_MULTIPLE = 16


class _Float8Product(nn.Module):
    """Gives torchao's layer the product of our layers, for weights that are whole, cut, or in 8 bits already."""

    config: Float8LinearConfig
    linear_mm_config: Any
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x @ weight.T` in 8 bits, in the dtype of `x`."""
        if not tensor_already_casted_to_fp8(weight):
            weight = weight.to(x.dtype)
        out: Tensor = matmul_with_hp_or_float8_args.apply(x, weight.t(), self.linear_mm_config, self.config)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def _fits(module: nn.Module, _name: str, *, left_out: Collection[nn.Module], least: int, multiple: int) -> bool:
    """Whether a linear layer multiplies in 8 bits; `least` and `multiple` are of its features in and out."""
    assert isinstance(module, nn.Linear), "torchao asks of linear layers alone"
    sizes = (module.in_features, module.out_features)
    return module not in left_out and min(sizes) >= least and not any(size % multiple for size in sizes)


def convert_linears(model: LanguageModel, precision: PrecisionConfig, *, device_type: str, tp: int) -> int:
    """Changes the linear layers of the blocks in place, before anything is sharded; returns how many.

    Args:
        model: on any device.
        precision: recipe and bound.
        device_type: products are emulated on a `cpu`.
        tp: ranks that will share a matrix, whose parts must fit a GPU's products.
    """
    emulate = device_type == "cpu"
    multiple = _MULTIPLE if emulate else _MULTIPLE * tp
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(precision.fp8_recipe.value), emulate=emulate, pad_inner_dim=not emulate
    )
    converted = 0
    for block in model.blocks():
        routers = {m for router in block.modules() if isinstance(router, Router) for m in router.modules()}
        fits = functools.partial(_fits, left_out=routers, least=precision.fp8_min_features, multiple=multiple)
        convert_to_float8_training(block, module_filter_fn=fits, config=config)
        for module in block.modules():
            if isinstance(module, Float8Linear):
                mix_in(module, _Float8Product)
                converted += 1
    return converted


def gather_in_float8(block: nn.Module, precision: PrecisionConfig, shards: int) -> None:
    """Lets FSDP gather the weights of converted layers in 8 bits; before it shards them.

    A parameter's shard is then torchao's tensor around the plain one, which `local_part` gives. With scales of rows,
    and where shards are not all of one size, FSDP gathers bfloat16.

    Args:
        block: whose layers are converted, and cut by tensor parallelism.
        precision: the recipe.
        shards: ranks that will share a weight.
    """
    if precision.fp8_recipe is not Float8Recipe.tensorwise:
        return
    for module in block.modules():
        if isinstance(module, Float8Linear) and local_part(module.weight).shape[0] % shards == 0:
            weight = module.weight
            target = module.config.cast_config_weight.target_dtype
            with torch.no_grad():
                wrapped = WeightWithDynamicFloat8CastTensor(local_part(weight), module.linear_mm_config, target)
                whole = like_parameter(wrapped, weight) if isinstance(weight, DTensor) else wrapped
            module.weight = nn.Parameter(whole, requires_grad=weight.requires_grad)
