"""What the model and the optimizer promise."""

import torch
from torch import Tensor

from regrow.launch.template.mylab.model.config import GegluConfig
from regrow.launch.template.mylab.model.hf import FAMILY
from regrow.launch.template.mylab.model.model import Geglu
from regrow.launch.template.mylab.optimizer.config import LionConfig
from regrow.launch.template.mylab.optimizer.lion import Lion
from regrow.models.init import fill_shard

TOKENS = torch.arange(12).reshape(1, 12) % 7


def tiny_model() -> Geglu:
    config = GegluConfig(
        name="tiny", vocab_size=50, max_seq_len=16, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48
    )
    model = Geglu(config)
    model.init_buffers(torch.device("cpu"), 16)
    for name, parameter in model.named_parameters():
        rule, start = model.init_rules()[name], (0,) * parameter.ndim
        fill_shard(parameter.data, name=name, rule=rule, global_shape=parameter.shape, offset=start, seed=1)
    return model


def train_one_step(model: Geglu, optimizer: Lion, skip: float = 0.0) -> None:
    logits: Tensor = model(TOKENS)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()  # type: ignore[no-untyped-call]
    optimizer.step(1e-2, torch.ones((), dtype=torch.float64), torch.tensor(skip))


def test_what_comes_later_changes_nothing_before() -> None:
    model, other = tiny_model(), TOKENS.clone()
    other[0, 8:] = 40
    with torch.no_grad():
        before, after = model(TOKENS), model(other)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


def test_config_json_describes_the_model() -> None:
    config = tiny_model().config
    assert FAMILY.read(FAMILY.describe(config), "tiny") == config


def test_lion_takes_steps_of_one_size_and_skips_one() -> None:
    model = tiny_model()
    optimizer = Lion(LionConfig(lr=1e-2, weight_decay=0.0), model)
    start = model.output.weight.detach().clone()
    train_one_step(model, optimizer, skip=1.0)
    assert torch.equal(model.output.weight, start)
    train_one_step(model, optimizer)
    moved = (model.output.weight.detach() - start).abs()
    assert torch.allclose(moved[moved > 0], torch.tensor(1e-2), atol=1e-6)
    assert {name.rpartition(".")[2] for name in optimizer.state_tensors()} == {"momentum"}
