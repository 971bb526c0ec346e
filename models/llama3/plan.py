"""How Llama 3 may be cut."""

from regrow.models.plan import ShardingPlan, Style

__all__ = ["LLAMA3_PLAN"]

LLAMA3_PLAN: ShardingPlan = {
    "tok_embeddings": Style.vocabulary,
    "layers.*.attention_norm": Style.sequence,
    "layers.*.attention": Style.enter,
    "layers.*.attention.wq": Style.columns,
    "layers.*.attention.wk": Style.columns,
    "layers.*.attention.wv": Style.columns,
    "layers.*.attention.wo": Style.rows,
    "layers.*.ffn_norm": Style.sequence,
    "layers.*.feed_forward": Style.enter,
    "layers.*.feed_forward.w1": Style.columns,
    "layers.*.feed_forward.w3": Style.columns,
    "layers.*.feed_forward.w2": Style.rows,
    "norm": Style.sequence,
    "output": Style.output,
}
