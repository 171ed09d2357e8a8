"""What runs on a GPU, in Triton's interpreter: heads, and a whole model with all its kernels."""

import pytest
import torch
from torch import Tensor

from nanopost.data.collate import collate
from nanopost.data.schema import Sample
from nanopost.kernels import dispatch
from nanopost.kernels.linear_cross_entropy import linear_cross_entropy
from nanopost.kernels.linear_logps import linear_logps
from nanopost.losses import entropy, token_logps
from tests.tiny import tiny_model

pytest.importorskip("triton", reason="Triton is an extra: pip install nanopost[kernels]")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    """The GPU's choices, for tensors of the CPU."""

    def chosen(*tensors: Tensor) -> bool:
        same = all(x.is_contiguous() and x.dtype == tensors[0].dtype for x in tensors)
        return same and tensors[0].dtype != torch.float64

    monkeypatch.setattr(dispatch, "fused", chosen)
    monkeypatch.setattr(dispatch, "chunk", lambda hidden, words: 4)


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [grad.double() for grad in torch.autograd.grad(loss, leaves, retain_graph=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_heads(fused, count, dtype, tolerance):
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 8, generator=draw).to(dtype).requires_grad_() for n in (count, 51)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    ids, weights = torch.randint(51, (count,), generator=draw), torch.randn(3, count, generator=draw).double()
    weights[:, 1:3] = 0
    assert dispatch.head_path(*leaves).__name__.endswith("chunked")

    def mixed(outputs: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([(out.double() * w).sum() for out, w in zip(outputs, weights, strict=True)]).sum()

    logits = exact[0] @ exact[1].T
    slow = token_logps(logits, ids, temperature=0.7), entropy(logits / 0.7), (logits / 0.7).logsumexp(-1)
    for ours, theirs in (
        (mixed(linear_logps(*leaves, ids, 0.7)), mixed(slow)),
        (0.3 * linear_cross_entropy(*leaves, ids).sum(), -0.3 * token_logps(logits, ids).sum()),
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
        found = gradients(ours, *leaves)
        for mine, truth in zip(found, gradients(theirs, *exact), strict=True):
            torch.testing.assert_close(mine, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alike", [False, True])
def test_a_model_with_every_kernel(fused, tmp_path, monkeypatch, alike):
    """Three rows share a beginning, one has no supervised token; values and gradients of all weights."""
    model = tiny_model(tmp_path, dtype=torch.float32)
    samples = [Sample((*range(20), 1, 2, k), (False,) * 20 + (True,) * 3) for k in range(3)]
    batch = collate([*samples, Sample((3, 4), (False, False))])
    found = []
    for _ in range(2):
        options = {"mask": batch.completion_mask, "spans": batch.spans, "alike": alike}
        logps = model.logps(batch.input_ids, batch.target_ids, **options)
        found.append([logps, *torch.autograd.grad(0.2 * logps.sum(), [*model.parameters()])])
        monkeypatch.setattr(dispatch, "fused", lambda *tensors: False)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
