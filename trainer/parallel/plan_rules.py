"""Whether a model's sharding plan fits the number of ranks; a plan of one's own may split what cannot be split."""

import fnmatch
from collections.abc import Iterator

from torch import nn

from regrow.errors import ConfigError
from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.models.layers import Attention
from regrow.models.plan import Style
from regrow.trainer.parallel.layout import divisors_of

__all__ = ["check_plan", "planned_modules"]


def planned_modules(model: LanguageModel) -> Iterator[tuple[str, nn.Module, Style]]:
    """Name, module and style of what the plan names, in the plan's order."""
    for pattern, style in model.plan().items():
        for name, module in model.named_modules():
            if fnmatch.fnmatchcase(name, pattern) and name.count(".") == pattern.count("."):
                yield name, module, style


def check_plan(model: LanguageModel, config: DecoderConfig, tp: int) -> None:
    """Whether each matrix can be split over `tp` ranks as the plan says.

    Args:
        model: whole; the meta device will do.
        config: the model's.
        tp: ranks.

    Raises:
        ConfigError: naming the module, the rule and the remedy.
    """
    for name, module, style in planned_modules(model):
        weight = getattr(module, "weight", None)
        if style not in (Style.colwise, Style.rowwise) or not isinstance(weight, nn.Parameter):
            continue
        side = 0 if style is Style.colwise else 1
        features = weight.shape[side]
        if features % tp:
            raise ConfigError(
                f"parallel.tp must divide the {('output', 'input')[side]} features of {name} ({features}), which the "
                f"plan of {type(model).__name__} splits ({style.name}), but is {tp}; use {divisors_of(features)}"
            )
        parent = model.get_submodule(name.rpartition(".")[0])
        heads = style is Style.colwise and isinstance(parent, Attention) and module in (parent.wk, parent.wv)
        if heads and config.n_kv_heads % tp:
            raise ConfigError(
                f"the plan of {type(model).__name__} must give {name} Style.kv_heads with parallel.tp={tp}, whose "
                f"ranks share key/value heads (model.n_kv_heads is {config.n_kv_heads}), but gives colwise; change "
                f"the plan or use {divisors_of(config.n_kv_heads)} for parallel.tp"
            )
