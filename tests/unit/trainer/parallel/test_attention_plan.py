"""What a layout's attention is given, and what its recomputation keeps."""

from collections import Counter
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from regrow.models.base import LanguageModel
from regrow.models.config import AttentionKernel
from regrow.models.documents import Documents, describe_documents
from regrow.models.layers import Attention
from regrow.models.llama3.config import Llama3Config
from regrow.models.llama3.model import Llama3
from regrow.trainer.parallel.apply import _checkpoint_activations
from regrow.trainer.parallel.attention import AttentionPlan, plan_attention
from tests.attention import plain_mask
from tests.support import TINY_MODEL, compose_config, typed_config

META = torch.device("meta")


def config(*overrides: str) -> Llama3Config:
    made = typed_config([*TINY_MODEL, *overrides]).model
    assert isinstance(made, Llama3Config)
    return made


def model_on_meta(*overrides: str) -> Llama3:
    with META:
        model = Llama3(config(*overrides))
    model.init_buffers(META, 64)
    return model


def plan(model: LanguageModel, *overrides: str, dtype: torch.dtype = torch.bfloat16) -> AttentionPlan:
    return plan_attention(model, config(*overrides), dtype, None, accelerator=True)


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("selective", "times"), [(True, 1), (False, 2)])
def test_selective_recomputation_keeps_what_segments_gave(selective: bool, times: int) -> None:
    model = model_on_meta("model.window=8")
    documents = describe_documents(torch.arange(64).expand(2, -1) // 10)
    tokens = torch.zeros(2, 64, dtype=torch.long, device=META)
    mask = plan(model).mask(documents, tokens)
    _checkpoint_activations(model, selective=selective, whole=True)
    with _Count() as count:
        model(tokens, mask).sum().backward()
    layers = len(model.blocks())
    assert count.calls["torch_attn._varlen_attn.default"] == times * layers
    assert count.calls["torch_attn._varlen_attn_backward.default"] == layers


def test_without_documents_and_windows_attention_is_causal_and_no_more() -> None:
    model = model_on_meta()
    tokens = torch.zeros(2, 64, dtype=torch.long, device=META)
    assert plan(model).mask(None, tokens) is None
    windowed = plan(model_on_meta("model.window=8")).mask(None, tokens)
    assert isinstance(windowed, Documents)
    assert windowed.boundaries.shape == (3,)


def test_each_window_of_the_layers_is_prepared_once() -> None:
    model = model_on_meta("model.window=8")
    first = model.blocks()[0].get_submodule("attention")
    assert isinstance(first, Attention)
    first.window = 0
    made = plan(model)
    assert (made.windows, made.kernel) == ((0, 8), AttentionKernel.varlen)
    mask = made.mask(None, torch.zeros(2, 64, dtype=torch.long, device=META))
    assert isinstance(mask, Documents)
    assert list(mask.prepared) == [0, 8]


def test_a_window_makes_another_run_and_a_kernel_does_not() -> None:
    names = [compose_config(o).run.name for o in ([], ["model.attention=sdpa"], ["model.window=8"])]
    assert names[0] == names[1] != names[2]


@final
class _Own(nn.Module):
    """A layer that computes with a mask of seq × seq."""


def test_layers_of_ones_own_are_given_a_mask() -> None:
    model = model_on_meta()
    for block in model.blocks():
        setattr(block, "attention", _Own())  # noqa: B010 - a block declares another type.
    numbers = torch.arange(32).expand(2, -1) // 5
    made = plan_attention(model, config(), torch.float32, None, accelerator=False)
    mask = made.mask(describe_documents(numbers), torch.zeros(2, 32, dtype=torch.long))
    assert isinstance(mask, Tensor)
    assert torch.equal(mask, plain_mask(numbers, 0))
