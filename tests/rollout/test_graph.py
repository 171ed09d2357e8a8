"""A replayed step, by a stand-in for CUDA graphs that keeps their contract: recording runs nothing."""

from contextlib import contextmanager

import pytest
import torch

from nanopost.rollout.graph import replayed


def test_on_a_cpu_a_step_is_itself():
    def step() -> None:
        raise AssertionError

    assert replayed(step, torch.device("cpu")) is step


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_on_a_gpu_every_call_has_the_effect_of_one_step(monkeypatch, calls):
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
    advance = replayed(step, torch.device("cuda"))
    for _ in range(calls):
        advance()
    assert state["count"] == calls
    assert len(eager) == 1 and len(recorded) == (calls > 1)  # compiled by the first, recorded once
