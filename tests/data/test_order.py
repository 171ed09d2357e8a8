"""Order: each index once an epoch, and a step is a pure function of (seed, step)."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data import order
from nanopost.data.order import step_indices

sizes = st.integers(1, 40)


@given(st.integers(0, 2**40), sizes, st.integers(1, 50))
def test_every_index_once_an_epoch(seed: int, size: int, batch_size: int) -> None:
    steps = 3 * size // batch_size + 1
    stream = [
        i for s in range(steps) for i in step_indices(seed=seed, step=s, batch_size=batch_size, size=size)
    ]
    assert len(stream) == steps * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.integers(0, 9), st.lists(st.integers(0, 10**9), min_size=2, max_size=6), sizes)
def test_a_step_depends_on_nothing_but_its_arguments(seed: int, steps: list[int], size: int) -> None:
    def at(step: int) -> list[int]:
        return step_indices(seed=seed, step=step, batch_size=5, size=size)

    forward = {step: at(step) for step in steps}
    order._permutation.cache_clear()
    assert {step: at(step) for step in reversed(steps)} == forward


def test_epochs_and_seeds_differ() -> None:
    epochs = {
        tuple(step_indices(seed=seed, step=epoch, batch_size=20, size=20))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(epochs) == 9
    assert tuple(range(20)) not in epochs


@pytest.mark.parametrize("bad", [{"seed": -1}, {"step": -1}, {"batch_size": 0}, {"size": 0}])
def test_out_of_range_arguments_are_named(bad: dict[str, int]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        step_indices(**{"seed": 0, "step": 0, "batch_size": 1, "size": 1, **bad})


def test_doctest() -> None:
    assert doctest.testmod(order).failed == 0
