"""Scores of labels against log_softmax in float64; shared vocabularies are in tests/distributed/test_evaluation.py."""

import pytest
import torch
from torch import Tensor, nn

from regrow.models.linear import Linear
from regrow.trainer.data.windows import IGNORE
from regrow.trainer.parallel.label_scores import LabelScores


def expected(hidden: Tensor, output: nn.Module, labels: Tensor) -> Tensor:
    logits = output(hidden).double().flatten(0, 1)
    asked, wanted = (labels != IGNORE).flatten(), labels.clamp(min=0).flatten()
    logprobs = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    missed = (logits.argmax(-1) != wanted).double()
    return torch.stack([logprobs, missed], 1) * asked[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hooked", [False, True])
@torch.no_grad()
def test_they_are_those_of_log_softmax(dtype: torch.dtype, hooked: bool) -> None:
    torch.manual_seed(0)
    output = Linear(16, 5000).to(dtype)
    nn.init.normal_(output.weight)
    hidden, labels = torch.randn(3, 700, 16, dtype=dtype), torch.randint(0, 5000, (3, 700))
    labels[:, ::3] = IGNORE
    best = output(hidden).argmax(-1)
    labels[:, 1::3] = best[:, 1::3]
    if hooked:
        output.register_forward_hook(lambda _module, _given, logits: logits * 2)
    told: list[Tensor] = []
    total = LabelScores(labels, None, told.append)(hidden, output)
    torch.testing.assert_close(told[0], expected(hidden, output, labels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, told[0][:, 0].sum())
    assert bool((told[0].view(3, 700, 2)[:, 1::3, 1] == 0).all())
    logits: list[Tensor] = []
    LabelScores(labels, None, logits.append).of(output(hidden))
    torch.testing.assert_close(logits[0], told[0], rtol=1e-5, atol=1e-5)
