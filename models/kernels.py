"""Which cases of the CPU's own kernels a model meets."""

import torch
from torch import nn

from regrow.models.cpu import Case, Kind, has_kernel
from regrow.models.layers import Attention, RMSNorm
from regrow.models.linear import Linear

__all__ = ["cases_of"]


def cases_of(model: nn.Module, batch: int, length: int, dtype: torch.dtype) -> list[Case]:
    """What there is to choose for a model, each once.

    Args:
        model: whole; on any device.
        batch: rows of a forward pass.
        length: tokens a row.
        dtype: of the activations.
    """
    rows, found = batch * length, list[Case]()
    # The norms of heads have a row per head.
    per_token: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            heads, key_heads = (m.out_features // module.head_dim for m in (module.wq, module.wk))
            found.append(Case(Kind.attention, dtype, (batch, length, heads, key_heads, module.head_dim)))
            if module.q_norm is not None and module.k_norm is not None:
                per_token |= {module.q_norm: heads, module.k_norm: key_heads}
        elif isinstance(module, Linear):
            found.append(Case(Kind.product, dtype, (rows, module.in_features, module.out_features)))
        elif isinstance(module, RMSNorm):
            found.append(Case(Kind.norm, dtype, (rows * per_token.get(module, 1), module.weight.numel())))
    return [c for c in dict.fromkeys(found) if has_kernel(c)]
