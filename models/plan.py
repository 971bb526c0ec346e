"""How a model may be split over ranks, as data: module patterns and styles. The trainer decides what a style does."""

from enum import Enum

__all__ = ["ShardingPlan", "Style"]


class Style(Enum):
    """What tensor and expert parallelism make of a module.

    Attributes:
        vocabulary: an embedding, split by rows; its output is summed over ranks.
        gather_input: a module whose input must be whole on every rank, and whose linear layers are split.
        colwise: a linear layer, its output features split.
        kv_heads: a linear layer whose output features are key/value heads; they go with the query heads that use
            them, so that ranks may share some.
        rowwise: a linear layer, its input features split; its output is summed over ranks.
        sequence: computed for each token by itself with the same weights, on a part of the sequence where that is
            split.
        per_head: the same weights for every head, of which a rank holds some.
        output: a linear layer, its output features (the vocabulary) split; its input is made whole first.
        split_tokens: each rank takes other tokens: a mixture of experts.
        expert: stacked weights, split by expert.
    """

    vocabulary = "vocabulary"
    gather_input = "gather_input"
    colwise = "colwise"
    kv_heads = "kv_heads"
    rowwise = "rowwise"
    sequence = "sequence"
    per_head = "per_head"
    output = "output"
    split_tokens = "split_tokens"
    expert = "expert"


# Patterns as in `fnmatch`, over the names of modules; `*` stands for a layer's number.
ShardingPlan = dict[str, Style]
