"""A reward model beside the verifier: means over the very samples of a stage's row, and where a run parts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanopost.data.chat import copy_chat, decode, load_chat
from nanopost.data.schema import Message, Record
from nanopost.evals.proxy import parting, proxy_row
from nanopost.evals.stages import complete
from nanopost.models.heads import load_score_model, save_score_model
from nanopost.models.weights import load_model
from nanopost.rewards.verdict import Verdict
from tests.tiny import hub_folder


def by_length(completion: str, answer: Any) -> Verdict:
    """A score that no reward model gives: the text's length, and the answer's."""
    return Verdict(len(completion) + answer, {"exact": 0.0}, "")


def test_both_means_are_over_the_samples_of_the_stage_table(tmp_path: Path) -> None:
    policy, judge = hub_folder(tmp_path / "policy"), tmp_path / "judge"
    scorer, chat = load_score_model(policy, labels=1), load_chat(policy)
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(0))
    copy_chat(policy, judge)
    save_score_model(scorer.config, scorer.state_dict(), judge, stop_ids=chat.stop_ids, labels=["reward"])
    records = [Record((Message("user", f"say {i}"),), None, 100 * i, {}, "f", i) for i in range(5)]
    row = proxy_row(policy, records, by_length, reward_model=judge, max_new_tokens=9, seed=2)
    rollouts = complete(load_model(policy), chat, records, temperature=1.0, max_new_tokens=9, seed=2)
    with torch.no_grad():  # one at a time, so that there is no padding
        scores = [float(scorer(torch.tensor([r.sample.ids]))[0, -1, 0]) for r in rollouts]
    assert row["reward_model"] == pytest.approx(sum(scores) / 5, abs=1e-5) and abs(row["reward_model"]) > 0.01
    assert row["verified"] == 200 + sum(len(decode(chat, r.completion_ids)) for r in rollouts) / 5


def run(rewards: list[float], verified: list[float]) -> list[dict[str, Any]]:
    return [
        {"step": i, "reward": r, "verified": v}
        for i, (r, v) in enumerate(zip(rewards, verified, strict=True))
    ]


def test_a_run_parts_where_the_mean_of_verified_is_best() -> None:
    found = parting(run([0, 1, 2, 3, 4, 5], [0.0, 0.5, 0.5, 0.5, 1.0, -6.0]), width=3)
    # Means of three steps: reward 1, 2, 3, 4; verified 1/3, 1/2, 2/3, −3/2. The third ends with step 4.
    assert found == {
        "step": 4,
        "reward_first": 1.0, "reward_at": 3.0, "reward_last": 4.0,
        "verified_first": pytest.approx(1 / 3), "verified_at": pytest.approx(2 / 3), "verified_last": -1.5,
    }  # fmt: skip


def test_a_short_run_is_one_mean_and_a_run_without_both_is_refused() -> None:
    found = parting(run([1, 2], [0.5, 0.25]))
    assert found["step"] == 1 and found["verified_first"] == found["verified_last"] == 0.375
    with pytest.raises(ValueError, match="no records"):
        parting([])
    with pytest.raises(ValueError, match="step 1 has no reward and verified"):
        parting([*run([1], [1]), {"step": 1, "reward": 2.0}])
