"""Llama's decoder with another activation."""

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from regrow.launch.template.mylab.model.config import GegluConfig
from regrow.launch.template.mylab.model.plan import GEGLU_PLAN
from regrow.models.layers import Decoder, DecoderBlock, FeedForward
from regrow.models.plan import ShardingPlan
from regrow.models.rope import apply_rope, rope_frequencies

__all__ = ["Geglu"]


@final
class GegluFeedForward(FeedForward):
    """GEGLU with the tanh approximation of GELU (Shazeer 2020, arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.gelu(self.w1(x), approximate="tanh") * self.w3(x))
        return out


@final
class Geglu(Decoder):
    """See `GegluConfig`."""

    config: GegluConfig

    def make_block(self) -> nn.Module:
        block = DecoderBlock(self.config, self.config.ffn_dim, apply_rope, qk_norm=False)
        block.feed_forward = GegluFeedForward(self.config.dim, self.config.ffn_dim)
        return block

    def frequencies(self) -> Tensor:
        return rope_frequencies(self.config.head_width, self.config.rope_theta)

    def layer_weights(self) -> float:
        return 3.0 * self.config.dim * self.config.ffn_dim

    def plan(self) -> ShardingPlan:
        return GEGLU_PLAN
