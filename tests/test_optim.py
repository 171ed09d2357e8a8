"""AdamW by hand, the schedule's values, clipping."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanopost import optim


class Two(nn.Module):
    """One matrix and one vector, as small as a model gets."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[2.0, -3.0]], dtype=torch.float64))
        self.vector = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor([[7.0]], dtype=torch.float64), requires_grad=False)


def by_hand(theta: float, gradients: list[float], *, rates: list[float], decay: float) -> float:
    """AdamW from its paper in scalars: β₁ = .8, β₂ = .9, ε = .01."""
    m = v = 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        m_hat, v_hat = m / (1 - 0.8**t), v / (1 - 0.9**t)
        theta = theta - lr * decay * theta - lr * m_hat / (math.sqrt(v_hat) + 0.01)
    return theta


def test_adamw_takes_the_steps_worked_out_by_hand() -> None:
    model = Two()
    optimizer = optim.adamw(model, lr=1.0, weight_decay=0.3, betas=(0.8, 0.9), eps=0.01)
    gradients, rates = [[0.5, 4.0, -0.02], [-1.5, 4.0, 0.03], [0.1, 0.0, 0.5]], [0.1, 0.05, 0.2]
    for (a, b, c), rate in zip(gradients, rates, strict=True):
        optim.set_lr(optimizer, rate)
        model.matrix.grad = torch.tensor([[a, b]], dtype=torch.float64)
        model.vector.grad = torch.tensor([c], dtype=torch.float64)
        optimizer.step()
    one, two, three = ([row[i] for row in gradients] for i in range(3))
    expected = [by_hand(2.0, one, rates=rates, decay=0.3), by_hand(-3.0, two, rates=rates, decay=0.3)]
    torch.testing.assert_close(model.matrix.tolist(), [expected], rtol=1e-12, atol=0)
    vector = by_hand(5.0, three, rates=rates, decay=0.0)  # a vector does not decay
    torch.testing.assert_close(model.vector.tolist(), [vector], rtol=1e-12, atol=0)
    assert model.frozen.item() == 7.0


def test_the_first_step_moves_by_the_learning_rate() -> None:
    """m̂/√v̂ = ±1 at step 1 whatever the gradient's size: a number to check on paper."""
    model = Two()
    optimizer = optim.adamw(model, lr=0.25, weight_decay=0.0, eps=1e-30)
    model.matrix.grad = torch.tensor([[1e-3, -70.0]], dtype=torch.float64)
    model.vector.grad = torch.tensor([0.4], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(model.matrix.tolist(), [[1.75, -2.75]], rtol=1e-12, atol=0)
    torch.testing.assert_close(model.vector.tolist(), [4.75], rtol=1e-12, atol=0)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="model: no parameter requires a gradient"):
        optim.adamw(Two().requires_grad_(False), lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [  # 2 steps of warm-up, 4 of decay to .2
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2]),
    ],
)
def test_schedule_values(kind: str, expected: list[float]) -> None:
    values = [optim.schedule(step, steps=6, warmup=2, kind=kind, final=0.2) for step in range(7)]
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)


@given(
    steps=st.integers(1, 50),
    share=st.floats(0, 1),
    kind=st.sampled_from(sorted(optim.SCHEDULES)),
    final=st.floats(0, 1),
)
def test_schedule_rises_then_falls_and_never_stands_still(
    steps: int, share: float, kind: str, final: float
) -> None:
    warmup = int(share * steps)
    values = [
        optim.schedule(step, steps=steps, warmup=warmup, kind=kind, final=final) for step in range(steps)
    ]
    assert all(0 < value <= 1 for value in values)  # the last step too: a rate of 0 would waste it
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    end = optim.schedule(steps, steps=steps, warmup=warmup, kind=kind, final=final)
    assert end == pytest.approx(1.0 if kind == "constant" else final)
    assert end == optim.schedule(3 * steps, steps=steps, warmup=warmup, kind=kind, final=final)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cosin"}, "kind: expected one of constant, cosine, linear, got 'cosin'"),
        ({"step": -1}, "step"),
        ({"steps": 0}, "steps"),
        ({"warmup": 7}, "warmup 7"),
        ({"final": 1.5}, "final: .*1.5"),
    ],
)
def test_schedule_refuses(change: dict, message: str) -> None:
    arguments = {"step": 0, "steps": 6, "warmup": 2, "kind": "cosine", "final": 0.2} | change
    with pytest.raises(ValueError, match=message):
        optim.schedule(arguments.pop("step"), **arguments)


def with_gradient(matrix: list[float], vector: float) -> Two:
    model = Two()
    model.matrix.grad = torch.tensor([matrix], dtype=torch.float64)
    model.vector.grad = torch.tensor([vector], dtype=torch.float64)
    return model


def test_clipping_scales_the_joint_norm() -> None:
    model = with_gradient([2.0, -3.0], 6.0)  # norm 7
    assert optim.clip_grad_norm(model, 3.5) == pytest.approx(7.0, rel=1e-12)
    torch.testing.assert_close(model.matrix.grad.tolist(), [[1.0, -1.5]], rtol=1e-6, atol=0)
    torch.testing.assert_close(model.vector.grad.tolist(), [3.0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_norm", [7.1, math.inf])
def test_a_gradient_inside_the_norm_is_left_alone(max_norm: float) -> None:
    model = with_gradient([2.0, -3.0], 6.0)
    assert optim.clip_grad_norm(model, max_norm) == pytest.approx(7.0, rel=1e-12)
    assert model.matrix.grad.tolist() == [[2.0, -3.0]] and model.vector.grad.tolist() == [6.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_raises_and_stays(bad: float) -> None:
    model = with_gradient([2.0, bad], 6.0)
    with pytest.raises(FloatingPointError, match=f"gradient norm is {bad}"):
        optim.clip_grad_norm(model, 1.0)
    assert model.vector.grad.tolist() == [6.0]


def test_clipping_refuses() -> None:
    with pytest.raises(ValueError, match=r"max_norm: .* got 0"):
        optim.clip_grad_norm(with_gradient([1.0, 1.0], 1.0), 0)
    with pytest.raises(ValueError, match="call backward first"):
        optim.clip_grad_norm(Two(), 1.0)


def test_beta_is_steered_by_a_share_of_the_error_and_at_most_a_fiftieth() -> None:
    """β(1 + K·clip(KL/target − 1, ±.2)): up where the KL is too large, down where it is too small."""
    assert optim.steer_beta(0.5, 6.6, target=6.0, gain=0.3) == pytest.approx(0.5 * (1 + 0.3 * 0.1), rel=1e-12)
    assert optim.steer_beta(0.5, 5.4, target=6.0) == pytest.approx(0.5 * (1 - 0.1 * 0.1), rel=1e-12)
    assert optim.steer_beta(0.5, 60.0, target=6.0) == pytest.approx(0.51, rel=1e-12)
    assert optim.steer_beta(0.5, -3.0, target=6.0) == pytest.approx(0.49, rel=1e-12)
    assert optim.steer_beta(0.5, 6.0, target=6.0) == optim.steer_beta(0.5, 7.0, target=0.0) == 0.5
    for beta, target in ((0.0, 1.0), (0.5, -1.0)):
        with pytest.raises(ValueError, match=f"kl_target: .* got {target}, beta {beta}"):
            optim.steer_beta(beta, 1.0, target=target)
