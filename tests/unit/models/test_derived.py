"""What is no weight, in whatever layout."""

import pytest

from regrow.models.derived import is_derived


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("rope.freqs", True),
        ("freqs_cis", True),
        ("layers.3.moe.tokens_per_expert", True),
        ("layers.3.moe.tokens_per_expert_E", True),
        ("layers.3.moe.expert_bias", False),
        ("layers.0.attention.wq.weight", False),
    ],
)
def test_names(name: str, expected: bool) -> None:
    assert is_derived(name) is expected
