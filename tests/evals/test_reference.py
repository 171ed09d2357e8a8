"""What a preference run scores once: kept by content, read by a resumed run; and KTO's mismatched pairs."""

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from nanopost import distributed
from nanopost.data.schema import Sample
from nanopost.evals.reference import (
    Example,
    fixed_logps,
    mismatched,
    read_logps,
    sample_id,
    weights_id,
    write_logps,
)
from nanopost.evals.rollouts import completion_logps
from nanopost.models.weights import load_model
from tests.ranks import run_function
from tests.tiny import hub_folder


def sample(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Sample:
    return Sample(prompt + answer, (False,) * len(prompt) + (True,) * len(answer))


SAMPLES = [
    sample((1, 2), (3, 4, 5)),
    sample((1, 2, 3), (4, 5)),
    sample((7,), (8,)),
    sample((1, 2), (3, 4, 6)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return [hub_folder(tmp_path_factory.mktemp(name), seed=seed) for seed, name in enumerate(("a", "b"))]


def test_a_sample_is_named_by_its_tokens_and_its_mask() -> None:
    names = [sample_id(s) for s in SAMPLES]  # the first two have the same tokens and other masks
    assert len({*names}) == len(SAMPLES) and {len(name) for name in names} == {32}
    assert sample_id(Sample(SAMPLES[0].ids, SAMPLES[0].mask)) == names[0]


def test_weights_are_named_by_their_bytes(folders, tmp_path) -> None:
    assert weights_id(folders[0]) == weights_id(hub_folder(tmp_path / "again")) != weights_id(folders[1])


def test_only_what_is_not_kept_is_scored(folders, tmp_path) -> None:
    path, calls = tmp_path / "logps/start.safetensors", list[list[Sample]]()

    def score(samples: list[Sample]) -> list[Tensor]:
        calls.append(samples)
        return [torch.tensor([float(sum(s.ids)), float(len(calls))]) for s in samples]

    def scored(samples: list[Sample], **options: bool) -> dict[str, Tensor]:
        return fixed_logps(path, folders[0], samples, score, **({"resume": True, "write": True} | options))

    first = scored([SAMPLES[1], SAMPLES[0], SAMPLES[1]], resume=False)
    assert calls == [[SAMPLES[1], SAMPLES[0]]]  # each once
    assert {name: x.tolist() for name, x in first.items()} == {
        sample_id(SAMPLES[0]): [15.0, 1.0],
        sample_id(SAMPLES[1]): [15.0, 1.0],
    }
    scored(SAMPLES[:2])
    assert len(calls) == 1
    both = scored(SAMPLES[::-1])  # another order, and new ones
    assert calls[1:] == [[SAMPLES[3], SAMPLES[2]]] and len(both) == 4
    assert both[sample_id(SAMPLES[2])].tolist() == [15.0, 2.0]
    assert {*read_logps(path, weights=weights_id(folders[0]))} == {*both}
    scored(SAMPLES, resume=False)
    assert len(calls) == 3 and len(calls[-1]) == 4  # a new run reads nothing
    with pytest.raises(
        ValueError, match=r"start\.safetensors: log-probs under the weights .*, this start has"
    ):
        fixed_logps(path, folders[1], SAMPLES, score, resume=True, write=True)


def test_what_is_not_to_be_written_is_not(folders, tmp_path) -> None:
    path = tmp_path / "start.safetensors"
    fixed_logps(path, folders[0], SAMPLES, lambda s: [torch.zeros(2)] * len(s), resume=True, write=False)
    assert not path.exists() and read_logps(path, weights="any") == {}


def test_log_probs_come_back_bit_for_bit(folders, tmp_path) -> None:
    model = load_model(folders[0])
    logps = dict(zip(map(sample_id, SAMPLES), completion_logps(model, SAMPLES), strict=True))
    write_logps(tmp_path / "x.safetensors", logps, weights="w")
    back = read_logps(tmp_path / "x.safetensors", weights="w")
    assert {*back} == {*logps} and all(torch.equal(back[name], logps[name]) for name in logps)
    assert [len(back[sample_id(s)]) for s in SAMPLES] == [sum(s.mask) for s in SAMPLES]


def score_on_ranks(folder: str) -> list:
    """Ranks with unequal numbers of forward passes."""
    model = distributed.shard(load_model(folder))
    samples = [sample((1, 2, i), tuple(range(3, 4 + i))) for i in range(7)]
    with distributed.gathered(model):
        mine = completion_logps(model, distributed.shard_rows(samples), micro_batch=1)
    return [logps.tolist() for logps in distributed.join_rows(mine)]


def test_ranks_score_unequal_shares_and_all_get_all(folders) -> None:
    one = score_on_ranks(str(folders[0]))
    two = run_function("tests.evals.test_reference", "score_on_ranks", ranks=2, args=(str(folders[0]),))
    assert two[0] == two[1] and [len(x) for x in one] == [1, 2, 3, 4, 5, 6, 7]
    for a, b in zip(one, two[0], strict=True):
        assert a == pytest.approx(b, abs=1e-5)


# ---- mismatched pairs

PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple)
ANSWERS = st.lists(st.integers(3, 9), min_size=1, max_size=4).map(tuple)


@given(st.lists(st.tuples(PROMPTS, st.lists(ANSWERS, min_size=1, max_size=2)), min_size=2, max_size=6))
def test_every_prompt_gets_a_completion_to_another_prompt(records) -> None:
    assume(len({prompt for prompt, _ in records}) > 1)
    examples = [
        Example(f"x:{i}", tuple(sample(prompt, a) for a in answers), (True, False)[: len(answers)])
        for i, (prompt, answers) in enumerate(records)
    ]
    found = mismatched(examples, longest=100)
    for i, (example, (prompt, answers)) in enumerate(zip(found, records, strict=True)):
        assert example.samples == examples[i].samples and len(example.others) == len(answers)
        following = [*records[i + 1 :], *records[:i]]
        giver = next(others for other, others in following if other != prompt)
        for k, other in enumerate(example.others):
            assert other == sample(prompt, giver[k % len(giver)])
    assert mismatched(examples, longest=100) == found


def test_a_completion_that_does_not_fit_is_passed_over_and_none_is_named() -> None:
    long, short = sample((1,), (5,) * 6), sample((2, 2, 2), (6,))
    last = sample((3,), (7, 7))
    examples = [Example(f"data.jsonl:{i + 1}", (s,), (True,)) for i, s in enumerate((short, long, last))]
    (first, second, third) = mismatched(examples, longest=6)
    assert first.others == (sample((2, 2, 2), (7, 7)),)  # not six tokens more
    assert second.others == (sample((1,), (7, 7)),) and third.others == (sample((3,), (6,)),)
    with pytest.raises(ValueError, match=r"data\.jsonl:1: no completion to another prompt fits"):
        mismatched(examples[:2], longest=6)
    same = [Example(f"data.jsonl:{i}", (sample((1,), (i,)),), (True,)) for i in (4, 5)]
    with pytest.raises(ValueError, match=r"data\.jsonl:4: .*is every prompt the same"):
        mismatched(same, longest=6)
