"""A replayed step, by a stand-in for CUDA graphs that keeps their contract: recording runs nothing."""

from contextlib import contextmanager

import pytest
import torch

from nanopost.rollout.graph import kept_casts, replayed


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_every_call_has_the_effect_of_one_step(monkeypatch, calls):
    state, recording, eager = {"count": 0}, [], []

    class Graph:
        def replay(self) -> None:
            assert recorded, "nothing was recorded"
            state["count"] += 1

    recorded: list[Graph] = []

    @contextmanager
    def record(graph: Graph):
        recording.append(True)
        yield
        recording.pop()
        recorded.append(graph)

    def step() -> None:
        if not recording:  # kernels that are recorded do not run
            state["count"] += 1
            eager.append(True)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    advance = replayed(step)
    for _ in range(calls):
        advance()
    assert state["count"] == calls
    assert len(eager) == 1 and len(recorded) == (calls > 1)  # compiled by the first, recorded once


def test_casts_are_kept_for_the_block_alone():
    weight = torch.ones(2, 2, requires_grad=True)
    x = torch.ones(1, 2)

    def product() -> float:
        return float((x @ weight).detach()[0, 0])

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with kept_casts():
            assert torch.is_autocast_cache_enabled() and product() == 2.0
            with torch.no_grad():
                weight.fill_(3.0)
            assert product() == 2.0  # the cast of before
        assert not torch.is_autocast_cache_enabled() and product() == 6.0
        with kept_casts():
            assert product() == 6.0  # and nothing of the first block is left
