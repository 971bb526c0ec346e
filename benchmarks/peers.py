"""The same model trained as one would with `transformers` alone."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import transformers
from torch import Tensor

from regrow.models.llama3.config import Llama3Config
from regrow.models.llama3.model import Llama3
from regrow.trainer.config import AdamWConfig
from regrow.trainer.data.loader import MicroBatch

__all__ = ["TransformersLoop"]


@final
class TransformersLoop:
    """A plain loop over `LlamaForCausalLM`: SDPA, fused AdamW, clipping; bfloat16 by autocast, masters in float32.

    Args:
        model: ours; the peer starts from the same weights.
        config: of the optimizer.
        grad_clip: largest gradient norm.
        bf16: compute in bfloat16.
    """

    def __init__(self, model: Llama3, config: AdamWConfig, grad_clip: float, *, bf16: bool) -> None:
        device = next(model.parameters()).device
        self._autocast: Callable[[], Any] = lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self._model = _llama(model.config).to(device)
        self._model.load_state_dict(_renamed(model))
        self._model.train()
        self._grad_clip = grad_clip
        self._parameters = list(self._model.parameters())
        # As in our models, what is neither a norm nor an embedding decays.
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": d} for d in (0.0, config.weight_decay)]
        for name, parameter in self._model.named_parameters():
            groups[parameter.ndim > 1 and "embed_tokens" not in name]["params"].append(parameter)
        self._optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )

    def step(self, micro_batches: Sequence[MicroBatch], lr: float) -> float:
        """One optimizer step; returns the mean loss."""
        count = torch.tensor(sum(m.labels.numel() for m in micro_batches))
        total = torch.zeros(())
        for batch in micro_batches:
            with self._autocast():
                # The labels are those of the next token already.
                loss = self._model(
                    input_ids=batch.tokens,
                    labels=batch.labels,
                    shift_labels=batch.labels,
                    num_items_in_batch=count,
                    use_cache=False,
                ).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(total)


def _llama(config: Llama3Config) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied_embeddings,
            attn_implementation="sdpa",
        )
    )


_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers.": "model.layers.",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output": "lm_head",
}


def _renamed(model: Llama3) -> dict[str, Tensor]:
    """Our weights under the peer's names, rows of queries and keys in its order of RoPE's pairs."""
    head_dim = model.config.dim // model.config.n_heads
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if name.endswith(("wq.weight", "wk.weight")):
            pairs = whole.unflatten(0, (-1, head_dim // 2, 2))
            whole = pairs.transpose(1, 2).flatten(0, 2)
        theirs = "model.norm.weight" if name == "norm.weight" else name
        for ours, peers in _NAMES.items():
            theirs = theirs.replace(ours, peers)
        weights[theirs] = whole.detach().clone()
    return weights
