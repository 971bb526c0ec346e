"""Kernels for CPUs, of torch's own operators: as exact as torch's, used where they were measured to be faster."""

import torch

from regrow.models.cpu.attention import causal_attention
from regrow.models.cpu.choice import WINS_BY, Case, Kind, decide, is_used, use
from regrow.models.cpu.linear import PRODUCTS, linear, outer, product
from regrow.models.cpu.measure import has_kernel, measure, plain_attention
from regrow.models.cpu.pointwise import rms_norm

__all__ = [
    "CPU_PRODUCTS",
    "WINS_BY",
    "Case",
    "Kind",
    "causal_attention",
    "decide",
    "has_kernel",
    "is_used",
    "linear",
    "measure",
    "outer",
    "plain_attention",
    "product",
    "rms_norm",
    "use",
]

# Operators whose results are expensive to compute again.
CPU_PRODUCTS = (*PRODUCTS, torch.ops.regrow.causal_attention.default)
