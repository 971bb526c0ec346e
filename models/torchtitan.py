"""torchtitan's names for the models here: those of every generation are read, today's are written.

Its layout is the models' but for names, and for queries, keys and values, which torchtitan's models now train as one
matrix: a group of rows for each key/value head, in it the queries that share the head, the key, and the value. A
checkpoint holds the weights apart all the same, and the optimizer's moments as they are trained.
"""

import re
from collections.abc import Collection, Iterable

from regrow.models.config import DecoderConfig
from regrow.models.hf import EMBEDDING, HEAD, HfKey, RowGroups

__all__ = ["fused_keys", "our_name", "todays_keys", "todays_name"]

_OPTIMIZER = r"(?P<optimizer>^optimizer\.(?:state|param_groups)\.|^)"
# In order. 2024: the models' names. Since 2026: `qkv_linear`, `lm_head`, `routed_experts`; letters for dimensions.
_TO_OURS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(^|\.)(?:_checkpoint_wrapped_module|_orig_mod)\.", r"\1"),
        (_OPTIMIZER + r"lm_head\.", r"\g<optimizer>output."),
        (r"\.attention\.qkv_linear\.(wq|wk|wv)\.", r".attention.\1."),
        (r"\.moe\.routed_experts\.inner_experts\.", ".moe.experts."),
        (r"\.moe\.experts\.(w[123])_E(?:FD|DF)(?=\.|$)", r".moe.experts.\1"),
        (r"\.moe\.expert_bias_E$", ".moe.expert_bias"),
        (r"\.moe\.shared_experts\.", ".shared_experts."),
    )
)
_FROM_OURS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (_OPTIMIZER + r"output\.", r"\g<optimizer>lm_head."),
        (r"\.attention\.(wq|wk|wv)\.", r".attention.qkv_linear.\1."),
        (r"\.moe\.experts\.(w[13])(?=\.|$)", r".moe.routed_experts.inner_experts.\1_EFD"),
        (r"\.moe\.experts\.w2(?=\.|$)", ".moe.routed_experts.inner_experts.w2_EDF"),
        (r"\.moe\.expert_bias$", ".moe.expert_bias_E"),
        (r"(^|\.)(layers\.\d+)\.shared_experts\.", r"\1\2.moe.shared_experts."),
    )
)
_FUSED = re.compile(r"^(?P<attention>.*\.attention)\.(?:qkv_linear\.)?wqkv\.(?P<rest>weight(?:\..*)?)$")
_MOMENT = re.compile(r"^(?P<attention>optimizer\.state\..*\.attention)\.(?P<which>w[qkv])\.(?P<rest>weight\..*)$")


def our_name(stored: str) -> str:
    """A stored name, of whichever generation, as the model's; other names stay."""
    for pattern, replacement in _TO_OURS:
        stored = pattern.sub(replacement, stored)
    return stored


def todays_name(name: str) -> str:
    """The inverse, for what is not fused."""
    for pattern, replacement in _FROM_OURS:
        name = pattern.sub(replacement, name)
    return name


def _groups(config: DecoderConfig) -> dict[str, RowGroups]:
    """Where queries, keys and values lie in the fused matrix."""
    queries = config.n_heads // config.n_kv_heads
    blocks = {"wq": (0, queries), "wk": (queries, 1), "wv": (queries + 1, 1)}
    return {
        which: RowGroups(groups=config.n_kv_heads, blocks=queries + 2, first=first, count=count)
        for which, (first, count) in blocks.items()
    }


def fused_keys(config: DecoderConfig, names: Collection[str]) -> list[HfKey]:
    """The model's tensors in the fused ones among some names, where they do not lie there by themselves too."""
    found = [match for match in map(_FUSED.match, names) if match]
    keys = [
        HfKey(name=f"{m['attention']}.{which}.{m['rest']}", hf_name=m[0], rows=rows)
        for m in found
        for which, rows in _groups(config).items()
    ]
    return [key for key in keys if key.name not in names]


def todays_keys(config: DecoderConfig, names: Iterable[str]) -> list[HfKey]:
    """Today's layout of a model's tensors, by name: weights apart, moments fused, a tied output layer twice."""
    groups, keys = _groups(config), []
    for name in names:
        moment = _MOMENT.match(name)
        if moment is not None:
            fused = f"{moment['attention']}.qkv_linear.wqkv.{moment['rest']}"
            keys.append(HfKey(name=name, hf_name=fused, rows=groups[moment["which"]]))
        else:
            keys.append(HfKey(name=name, hf_name=todays_name(name)))
        if name == EMBEDDING.name and config.tied_embeddings:
            keys.append(HfKey(name=name, hf_name=todays_name(HEAD.name)))
    return keys
