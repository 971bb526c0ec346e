"""torchtitan's model and optimizer as far as a checkpoint shows them, in two generations; weights by chance.

Today's (August 2026): `attention.qkv_linear.wqkv` is trained, and stored as `wq`, `wk` and `wv`; `lm_head`; optimizer
state by flat names, under the names that are trained. The one before has `attention.wq` and `output`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from regrow.models.llama3.config import Llama3Config


class FusedQkv(nn.Module):
    """Queries, keys and values as one matrix, rows grouped by key/value head."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.queries, self.head = config.n_heads // config.n_kv_heads, config.head_width
        self.wqkv = nn.Linear(config.dim, config.n_kv_heads * (self.queries + 2) * self.head, bias=False)
        self.register_state_dict_post_hook(self._split)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(self._merge)  # type: ignore[no-untyped-call]

    @staticmethod
    def _split(module: "FusedQkv", state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
        for which, rows in zip(("wq", "wk", "wv"), module.split(state.pop(f"{prefix}wqkv.weight")), strict=True):
            state[f"{prefix}{which}.weight"] = rows

    @staticmethod
    def _merge(module: "FusedQkv", state: dict[str, Tensor], prefix: str, *_args: Any) -> None:
        parts = [state.pop(f"{prefix}{which}.weight") for which in ("wq", "wk", "wv")]
        groups = [
            p.reshape(-1, n, module.head, p.shape[1]) for p, n in zip(parts, (module.queries, 1, 1), strict=True)
        ]
        state[f"{prefix}wqkv.weight"] = torch.cat(groups, dim=1).reshape(-1, parts[0].shape[1])

    def split(self, fused: Tensor) -> list[Tensor]:
        """Into queries, keys and values."""
        groups = fused.reshape(-1, self.queries + 2, self.head, fused.shape[1])
        parts = torch.split(groups, [self.queries, 1, 1], dim=1)
        return [p.reshape(-1, fused.shape[1]).contiguous() for p in parts]


class Plain(nn.Module):
    """Linear layers by name."""

    def __init__(self, **shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, (rows, columns) in shapes.items():
            setattr(self, name, nn.Linear(columns, rows, bias=False))


class Block(nn.Module):
    """One layer's parameters."""

    def __init__(self, c: Llama3Config, *, today: bool) -> None:
        super().__init__()
        q, kv = c.n_heads * c.head_width, c.n_kv_heads * c.head_width
        if today:
            self.attention = Plain(wo=(c.dim, q))
            self.attention.qkv_linear = FusedQkv(c)
        else:
            self.attention = Plain(wq=(q, c.dim), wk=(kv, c.dim), wv=(kv, c.dim), wo=(c.dim, q))
        self.feed_forward = Plain(w1=(c.ffn_dim, c.dim), w2=(c.dim, c.ffn_dim), w3=(c.ffn_dim, c.dim))
        self.attention_norm, self.ffn_norm = nn.RMSNorm(c.dim), nn.RMSNorm(c.dim)


class Titan(nn.Module):
    """All parameters of a model; it is never run."""

    def __init__(self, config: Llama3Config, *, today: bool) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(n): Block(config, today=today) for n in range(config.n_layers)})
        self.norm = nn.RMSNorm(config.dim)
        head = nn.Linear(config.dim, config.vocab_size, bias=False)
        setattr(self, "lm_head" if today else "output", head)
        if config.tied_embeddings:
            self.tok_embeddings.weight = head.weight


def make(config: Llama3Config, *, today: bool = True, seed: int = 0) -> tuple[Titan, torch.optim.AdamW]:
    """A model and its optimizer after seven steps along gradients by chance."""
    torch.manual_seed(seed)
    model = Titan(config, today=today)
    named = dict(model.named_parameters())
    group = {"params": list(named.values()), "param_names": list(named), "initial_lr": 1e-3}
    optimizer = torch.optim.AdamW([group], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(7):
        for parameter in named.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def optimizer_state(optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Flat, by the names of the parameters."""
    stored = optimizer.state_dict()
    (group,) = stored["param_groups"]
    flat: dict[str, Any] = {}
    for number, name in zip(group["params"], group["param_names"], strict=True):
        flat |= {f"state.{name}.{part}": value for part, value in stored["state"][number].items()}
        flat |= {f"param_groups.{name}.{k}": v for k, v in group.items() if k not in ("params", "param_names")}
    return flat


def load_optimizer(optimizer: torch.optim.AdamW, flat: dict[str, Any]) -> None:
    """The inverse; settings are those of the first parameter."""
    stored = optimizer.state_dict()
    (group,) = stored["param_groups"]
    names = group["param_names"]
    state = {
        number: {part: flat[f"state.{name}.{part}"] for part in ("exp_avg", "exp_avg_sq", "step")}
        for number, name in zip(group["params"], names, strict=True)
    }
    settings = {k: flat[f"param_groups.{names[0]}.{k}"] for k in group if k not in ("params", "param_names")}
    optimizer.load_state_dict(
        {"state": state, "param_groups": [{**settings, "params": group["params"], "param_names": names}]}
    )


def checkpoint(model: Titan, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """What is handed to `dcp.save`: the model's names at the top, the rest beside them."""
    return {
        **model.state_dict(),
        "optimizer": optimizer_state(optimizer),
        "train_state": {"step": 7, "ntokens_seen": 3584},
        "lr_scheduler": {"last_epoch": 7},
        "dataloader": {"dp_rank_0": b"bytes", "world_size": 2},
    }


def in_our_names(model: Titan, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """All tensors as Regrow names them, by their own computation."""
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        stem, _, rest = name.partition(".qkv_linear.wqkv")
        fused = modules.get(f"{stem.removeprefix('optimizer.state.')}.qkv_linear")
        if isinstance(fused, FusedQkv):
            parts = fused.split(value) if value.ndim else [value] * 3
            found.update(
                {f"{stem}.{which}{rest}": part for which, part in zip(("wq", "wk", "wv"), parts, strict=True)}
            )
        else:
            found[name.replace("lm_head", "output")] = value

    for name, parameter in model.named_parameters():
        add(name, parameter.detach())
        for part, value in optimizer.state[parameter].items():
            add(f"optimizer.state.{name}.{part}", value)
    return found
