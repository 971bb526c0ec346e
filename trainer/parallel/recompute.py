"""Recomputation within a memory budget."""

import functools

import torch.utils.checkpoint

from regrow.models.base import LanguageModel
from regrow.torch_compat import set_activation_budget
from regrow.trainer.config import ActivationCheckpoint, TrainConfig
from regrow.trainer.parallel.memory_rules import chosen_blocks

__all__ = ["apply_budget"]


def apply_budget(model: LanguageModel, train: TrainConfig) -> None:
    """Has the backward pass compute again what does not fit into `train.activation_memory_budget`.

    With compilation the compiler chooses within each block, by the cost of each result and its size (it minimises the
    operations computed again; Chen et al. 2016, arXiv:1604.06174, is the case of a budget of 0). Without it, so many
    blocks as the budget says are kept whole, and the others, spread evenly, are computed again whole.

    Args:
        model: before its blocks are compiled.
        train: its options of recomputation and compilation.
    """
    asked = train.activation_checkpoint is ActivationCheckpoint.budget
    if train.compile is True:
        # The compiler's own default keeps everything; it is set each time, since it belongs to the process.
        set_activation_budget(train.activation_memory_budget if asked else 1.0)
    elif asked:
        blocks = model.blocks()
        for index in chosen_blocks(len(blocks), train.activation_memory_budget):
            again = functools.partial(torch.utils.checkpoint.checkpoint, blocks[index].forward, use_reentrant=False)
            blocks[index].forward = again
