"""Qwen3, dense and with experts; parameter names as torchtitan's.

RoPE rotates elements i and i + H/2 together, as in the published weights.
"""

from typing import final

import torch
from torch import Tensor, nn

from regrow.models.layers import Decoder, DecoderBlock
from regrow.models.moe import MixtureBlock, MixtureOfExperts
from regrow.models.plan import ShardingPlan
from regrow.models.qwen3.config import Qwen3Config, Qwen3MoeConfig
from regrow.models.qwen3.plan import QWEN3_PLAN
from regrow.models.rope import apply_rope_halves, rope_frequencies

__all__ = ["Qwen3", "Qwen3Moe"]


@final
class Qwen3(Decoder):
    """The dense Qwen3; see `Qwen3Config` for its dimensions."""

    config: Qwen3Config

    def make_block(self) -> nn.Module:
        return DecoderBlock(self.config, self.config.ffn_dim, apply_rope_halves, qk_norm=True)

    def frequencies(self) -> Tensor:
        return rope_frequencies(self.config.head_dim, self.config.rope_theta)

    def layer_weights(self) -> float:
        return 3.0 * self.config.dim * self.config.ffn_dim

    def plan(self) -> ShardingPlan:
        return QWEN3_PLAN


@final
class Qwen3Moe(Decoder):
    """Qwen3 with experts; see `Qwen3MoeConfig` for its dimensions."""

    config: Qwen3MoeConfig

    def make_block(self) -> nn.Module:
        return MixtureBlock(self.config, apply_rope_halves, qk_norm=True)

    def frequencies(self) -> Tensor:
        return rope_frequencies(self.config.head_dim, self.config.rope_theta)

    def layer_weights(self) -> float:
        c = self.config
        return c.dim * (c.n_experts + 3.0 * (c.experts_per_token + c.n_shared_experts) * c.expert_ffn_dim)

    def init_buffers(self, device: torch.device, length: int) -> None:
        super().init_buffers(device, length)
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                module.init_buffers(device)

    def plan(self) -> ShardingPlan:
        return QWEN3_PLAN
