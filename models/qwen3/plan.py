"""How Qwen3 may be split over ranks, dense and with experts."""

from regrow.models.llama3.plan import LLAMA3_PLAN
from regrow.models.plan import ShardingPlan, Style

__all__ = ["QWEN3_PLAN"]

QWEN3_PLAN: ShardingPlan = {
    **LLAMA3_PLAN,
    "layers.*.attention.q_norm": Style.per_head,
    "layers.*.attention.k_norm": Style.per_head,
    "layers.*.shared_experts": Style.gather_input,
    "layers.*.shared_experts.w1": Style.colwise,
    "layers.*.shared_experts.w3": Style.colwise,
    "layers.*.shared_experts.w2": Style.rowwise,
    "layers.*.moe": Style.split_tokens,
    "layers.*.moe.router.gate": Style.sequence,
    "layers.*.moe.experts": Style.expert,
}
