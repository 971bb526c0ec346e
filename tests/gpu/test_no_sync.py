"""On a GPU the host never waits within a step, and a mixture of experts computes what its formula says."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from regrow.launch.config.composition import compose_config
from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.prepare import prepare_run
from regrow.launch.run.signals import StopFlag
from regrow.models.mixture_config import MixtureConfig
from regrow.models.moe import MixtureOfExperts
from regrow.trainer.data.feed import DeviceFeed, pinned
from regrow.trainer.loop import Trainer
from regrow.trainer.parallel.context import close_parallel, open_parallel
from tests.support import TINY_MODEL, tiny, typed_config
from tests.unit.trainer.test_feed import Listed, batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]

DEVICE = torch.device("cuda", 0)
# The device's products want widths that are multiples of 16 bytes.
MOE = ["model=qwen3_moe_debug", *(o for o in TINY_MODEL if not o.startswith("model.ffn")), "model.head_dim=16",
       "model.n_experts=4", "model.expert_ffn_dim=32"]  # fmt: skip


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delitem(os.environ, name, raising=False)
    yield
    torch.cuda.set_sync_debug_mode("default")
    close_parallel()


def a_trainer(overrides: list[str], folder: Path) -> Trainer:
    options = [*overrides, "launch.device=cuda", "checkpoint=disabled", "hooks=none", "precision=bf16"]
    spec = prepare_run(compose_config(options), folder, overrides=options, world_size=1)
    return compose_trainer(spec, open_parallel(spec.layout, "cuda", 60.0), StopFlag(), 1)


@pytest.mark.parametrize("documents", ["false", "true"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.usefixtures("one_rank")
def test_the_host_waits_for_nothing_in_the_steady_state(
    corpus: Path, tmp_path: Path, kind: str, documents: str
) -> None:
    data = [o for o in tiny(corpus) if not o.startswith("model.") or kind == "dense"]
    own = [] if kind == "dense" else MOE
    trainer = a_trainer([*own, *data, f"data.document_mask={documents}", "data.global_batch_size=8"], tmp_path)
    batches = trainer._make_batches(trainer.state)
    try:
        for step in range(4):
            assert batches.ready(30.0)
            # The first steps allocate, and choose kernels.
            torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
            trainer.batch = next(batches)
            trainer._loss_sum, _ = trainer._forward_backward(trainer.batch)
            _, trainer._grad_norm = trainer._update()
            pending = trainer._start_reduction(0.0)
            torch.cuda.set_sync_debug_mode("default")
            trainer._settle(pending)
    finally:
        batches.close()


def test_batches_come_whole_over_their_own_stream() -> None:
    """The device is kept busy, so that a copy which is not waited for would be seen half done."""
    numbers = range(1, 30)
    given = DeviceFeed(Listed([pinned(batch(n)) for n in numbers]), DEVICE)
    seen = []
    for _ in numbers:
        a = torch.randn(2048, 2048, device=DEVICE)
        (a @ a).sum()
        micro_batch = next(given).micro_batches[0]
        seen.append((micro_batch.tokens + micro_batch.labels).sum())
    assert torch.stack(seen).tolist() == [8 * (2 * n + 1) for n in numbers]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("options", [[], ["model.score_func=sigmoid", "model.n_expert_groups=2"]], ids=["softmax", "groups"])  # fmt: skip
def test_a_mixture_is_its_formula_on_the_device(dtype: torch.dtype, limit: float, options: list[str]) -> None:
    """Outputs and gradients against float64, with the experts that the device chose; the same each time."""
    config = typed_config([*MOE, *options]).model
    assert isinstance(config, MixtureConfig)
    torch.manual_seed(0)
    moe = MixtureOfExperts(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    moe = moe.to(DEVICE)
    moe.init_buffers(DEVICE)
    x = torch.randn(2, 100, config.dim, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def run() -> list[torch.Tensor]:
        out = moe(x, None)
        return [out, *torch.autograd.grad(out, [x, *moe.parameters()], grad)]

    found, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    with torch.no_grad():
        chosen = moe.router(x.flatten(0, 1), moe.expert_bias)[2].cpu()
    exact = MixtureOfExperts(config).double()
    exact.load_state_dict({n: t.double().cpu() for n, t in moe.state_dict().items()})
    wide = x.detach().double().cpu().requires_grad_()
    logits = F.linear(wide.flatten(0, 1), exact.router.gate.weight)
    scores = (logits.sigmoid() if options else logits.softmax(-1)).gather(1, chosen)
    weights = scores / scores.sum(-1, keepdim=True)
    rows = []
    for x_D, experts, shares in zip(wide.flatten(0, 1), chosen.tolist(), weights, strict=True):
        parts = [
            share * (exact.experts.w2[e] @ (F.silu(exact.experts.w1[e] @ x_D) * (exact.experts.w3[e] @ x_D)))
            for e, share in zip(experts, shares, strict=True)
        ]
        rows.append(torch.stack(parts).sum(0))
    out = torch.stack(rows).view(x.shape)
    expected = [out, *torch.autograd.grad(out, [wide, *exact.parameters()], grad.double().cpu())]
    for a, b in zip(found, expected, strict=True):
        assert float((a.double().cpu() - b).detach().norm()) <= limit * float(b.detach().norm())
