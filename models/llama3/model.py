"""Llama 3 with Meta's parameter names (as in torchtitan and torchtune)."""

from typing import final

from torch import Tensor, nn

from regrow.models.layers import Decoder, DecoderBlock
from regrow.models.llama3.config import Llama3Config
from regrow.models.llama3.plan import LLAMA3_PLAN
from regrow.models.plan import ShardingPlan
from regrow.models.rope import apply_rope, rope_frequencies

__all__ = ["Llama3"]


@final
class Llama3(Decoder):
    """The Llama 3 language model; see `Llama3Config` for its dimensions."""

    config: Llama3Config

    def make_block(self) -> nn.Module:
        return DecoderBlock(self.config, self.config.ffn_dim, apply_rope, qk_norm=False)

    def frequencies(self) -> Tensor:
        c, s = self.config, self.config.rope_scaling
        return rope_frequencies(
            c.head_width,
            c.rope_theta,
            factor=s.factor,
            low_freq_factor=s.low_freq_factor,
            high_freq_factor=s.high_freq_factor,
            original_max_seq_len=s.original_max_seq_len,
        )

    def layer_weights(self) -> float:
        return 3.0 * self.config.dim * self.config.ffn_dim

    def plan(self) -> ShardingPlan:
        return LLAMA3_PLAN
