"""How Llama 3 may be split over ranks."""

from regrow.models.plan import ShardingPlan, Style

__all__ = ["LLAMA3_PLAN"]

LLAMA3_PLAN: ShardingPlan = {
    "tok_embeddings": Style.vocabulary,
    "layers.*.attention_norm": Style.sequence,
    "layers.*.attention": Style.gather_input,
    "layers.*.attention.wq": Style.colwise,
    "layers.*.attention.wk": Style.kv_heads,
    "layers.*.attention.wv": Style.kv_heads,
    "layers.*.attention.wo": Style.rowwise,
    "layers.*.ffn_norm": Style.sequence,
    "layers.*.feed_forward": Style.gather_input,
    "layers.*.feed_forward.w1": Style.colwise,
    "layers.*.feed_forward.w3": Style.colwise,
    "layers.*.feed_forward.w2": Style.rowwise,
    "norm": Style.sequence,
    "output": Style.output,
}
