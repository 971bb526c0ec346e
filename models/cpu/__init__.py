"""What torch does slowly on CPUs, done faster with torch's own operators; the results are as exact as torch's."""

import torch
from torch import Tensor, nn

from models.cpu.attention import causal_attention
from models.cpu.linear import PRODUCTS, linear
from models.cpu.pointwise import rms_norm, swiglu

__all__ = ["CPU_PRODUCTS", "causal_attention", "linear", "on_plain_cpu", "rms_norm", "swiglu"]

# Operators whose results are dear to compute again.
CPU_PRODUCTS = (*PRODUCTS, torch.ops.regrow.causal_attention.default)


def on_plain_cpu(*tensors: Tensor) -> bool:
    """Whether the kernels here may take these: no subclass (DTensor) that means more than its values, no tracing."""
    if torch.compiler.is_compiling():
        return False
    return all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
