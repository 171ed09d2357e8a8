"""Every check of the preflight, with its fault planted."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from nanopost.data.chat import load_chat, record_samples
from nanopost.data.collate import collate
from nanopost.data.schema import Sample, parse_record, read_jsonl
from nanopost.evals import preflight_data as data
from nanopost.evals import preflight_model as models
from nanopost.evals import preflight_sampling as sampling
from nanopost.evals.preflight import CHECKS, Check, agree, tell
from nanopost.evals.preflight_overlap import overlap
from nanopost.evals.preflight_sentences import sentences
from nanopost.evals.rollouts import completion_logps
from nanopost.losses import aggregate, sft_loss
from nanopost.losses.variants import VARIANTS
from nanopost.models.trainable import LoRA
from nanopost.models.weights import load_model
from nanopost.plan import Fit
from nanopost.rewards.math import gsm8k
from nanopost.rewards.verdict import Unverified, Verdict
from nanopost.rollout.sampler import row_uniforms, sample
from tests.chat_fixtures import make_chat
from tests.tiny import hub_folder, write_chats


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    return hub_folder(tmp_path_factory.mktemp("preflight") / "hub")


@pytest.fixture
def model(hub):
    """Its distributions are far from uniform."""
    model = load_model(hub)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(4)
    return model


def talk(*texts: str, **more):
    """A record of turns, the user's first."""
    roles = ("user", "assistant") * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return parse_record({"messages": turns, **more}, file="chats.jsonl", line=7)


def fails(check: Check, name: str, *words: str) -> None:
    assert (check.name, check.outcome) == (name, "fail") and check.fix, check
    assert all(word in check.told for word in words), check.told


def test_rows_that_do_not_parse_never_get_there(tmp_path):
    (path := tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "robot", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: .*unknown role 'robot'"):
        read_jsonl(path)
    assert data.rows(path, [1, 2]).outcome == "pass"


def test_a_sample_that_trains_on_nothing(hub):
    good = record_samples(load_chat(hub), talk("a", "b"))
    assert data.supervised(good).outcome == "pass" and good[0].place == "chats.jsonl:7"
    bad = Sample((1, 2), (False, False), "chats.jsonl:9")
    fails(data.supervised([*good, bad]), "supervised", "chats.jsonl:9", "1 of 2")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: dataclasses.replace(s, mask=(*s.mask[:-1], False)),  # masked, as where padding is EOS
        lambda s: dataclasses.replace(s, ids=s.ids[:-1], mask=s.mask[:-1]),  # cut away
        lambda s: dataclasses.replace(s, ids=(*s.ids, s.ids[-1]), mask=(*s.mask, True)),  # twice
    ],
    ids=["masked", "cut", "twice"],
)
def test_a_target_without_its_one_stop_token(hub, spoil):
    chat = load_chat(hub)
    good = [s for text in ("b", "hello") for s in record_samples(chat, talk("a", text))]
    assert data.stop_tokens(chat, good).outcome == "pass"
    fails(data.stop_tokens(chat, [good[0], spoil(good[1])]), "stop token", "chats.jsonl:7")


def test_a_text_ends_with_eos_and_may_quote_one(hub):
    chat = load_chat(hub)
    (text,) = record_samples(chat, parse_record({"text": "a<|im_end|>b"}, file="t", line=1))
    assert data.stop_tokens(chat, [text]).outcome == "pass"
    fails(data.stop_tokens(chat, [Sample(text.ids[:-1], text.mask[:-1], "t:1")]), "stop token", "t:1")


def test_bos_twice(tmp_path):
    chat = make_chat(tmp_path, "header")
    (good,) = record_samples(chat, talk("a", "b"))
    assert data.bos(chat, [good]).outcome == "pass"
    twice = Sample((good.ids[0], *good.ids), (False, *good.mask), "chats.jsonl:8")
    fails(data.bos(chat, [good, twice]), "bos", "chats.jsonl:8", "1 of 2")
    later = dataclasses.replace(good, ids=(*good.ids[:3], good.ids[0], *good.ids[4:]))
    assert data.bos(chat, [later]).outcome == "warn"
    assert data.bos(make_chat(tmp_path / "chatml"), [good]).outcome == "n/a"


def test_a_template_that_writes_earlier_turns_anew(tmp_path, hub):
    record = talk("a", "<think>x</think>b", "c", "d")
    plain, think = load_chat(hub), make_chat(tmp_path, "think")
    assert data.history(record_samples(plain, record)).outcome == "pass"
    anew = data.history(record_samples(think, record))
    assert anew.outcome == "warn" and "chats.jsonl:7" in anew.told and "1 of 1" in anew.told
    assert data.history(record_samples(plain, talk("a", "b"))).outcome == "n/a"


def test_a_sampler_that_stops_at_what_the_template_never_writes(tmp_path):
    folder = hub_folder(tmp_path / "hub")
    assert data.stop_ids(load_chat(folder)).outcome == "pass"
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    stop = load_chat(folder).tokenizer.token_to_id("<|im_end|>")
    check = data.stop_ids(load_chat(folder))
    fails(check, "stop ids", "3 ", f"{stop} '<|im_end|>'")
    assert "generation_config.json" in check.fix
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [stop, 3]}
    (folder / "config.json").write_text(json.dumps(config))
    assert data.stop_ids(load_chat(folder)).outcome == "warn"


def test_a_stop_token_that_a_frozen_head_cannot_learn(hub, model):
    chat = load_chat(hub)
    assert models.stop_row(model, chat).outcome == "pass"
    for begun in (torch.zeros(()), model.lm_head.weight.detach().mean(0)):
        with torch.no_grad():
            model.lm_head.weight[chat.stop_ids[0]] = begun
        frozen = model.requires_grad_(False)
        fails(models.stop_row(frozen, chat), "stop row", "'<|im_end|>'")
        assert models.stop_row(model.requires_grad_(True), chat).outcome == "pass"  # it will be


def test_a_model_that_is_not_its_folder(hub, model):
    assert models.tied_and_rope(model, hub).outcome == "pass"
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    fails(models.tied_and_rope(model, hub), "tied and rope", "tie_word_embeddings is True", "is not tied")
    model = load_model(hub)
    model.config = dataclasses.replace(model.config, rope_theta=10000.0)
    fails(models.tied_and_rope(model, hub), "tied and rope", "rope_theta is 10000.0", "500.0")


def scored(score, right=None):
    """A verifier that gives a score, and says right where told to."""
    return lambda completion, answer: Verdict(score(completion, answer), {}, "")


def test_verifiers_that_judge_wrongly(monkeypatch):
    records = [talk("a", answer=str(n)) for n in (3, 4, 5)]
    good = data.verifier(gsm8k, records)
    assert good.outcome == "pass" and "other rows' gold 0," in good.told and "ms a call" in good.told
    fails(data.verifier(scored(lambda c, a: 0.0), records), "verifier", "chats.jsonl:7", "scores 0, not 1")
    fails(data.verifier(scored(lambda c, a: 1.0), records), "verifier", "an empty answer scores 1")
    broken = data.verifier(scored(lambda c, a: 1.0 / len(c)), records)
    fails(broken, "verifier", "chats.jsonl:7: no verdict", "ZeroDivisionError")
    paid = data.verifier(scored(lambda c, a: float(bool(c))), records)
    assert paid.outcome == "warn" and "other rows' gold 1" in paid.told
    alike = data.verifier(gsm8k, records[:1] * 3)
    assert alike.outcome == "warn" and "the same" in alike.told
    apart = data.verifier(gsm8k, [*records, talk("a", "it is 6", answer="9")])
    assert apart.outcome == "warn" and "last assistant turn" in apart.told
    monkeypatch.setattr(data, "SLOW", 0.0)
    assert "slow" in data.verifier(gsm8k, records).fix


def test_answers_without_a_reward():
    good, gone = Verdict(1.0, {}, ""), Unverified("too deep")
    assert sampling.rewards([good, good]).outcome == "pass"
    some = sampling.rewards([good, gone, good])
    assert (some.outcome, some.told) == ("warn", "3 answers, 2 rewards, not one: too deep")
    fails(sampling.rewards([gone, gone]), "rewards", "2 answers, 0 rewards, not one: too deep")


@pytest.fixture
def rollouts(hub, model):
    uniforms = row_uniforms(seed=0, step=0, prompts=[0], group_size=4, count=8)
    stops = load_chat(hub).stop_ids
    options = {"group_size": 4, "max_new_tokens": 8, "stop_ids": stops, "temperature": 2.0}
    return sample(model, [[3, 1, 4, 1, 5]], uniforms=uniforms, **options)


def test_a_trainer_that_forgets_the_temperature(model, rollouts):
    samples, old = [r.sample for r in rollouts], [r.old_logps for r in rollouts]
    new = completion_logps(model, samples, temperature=2.0)
    assert sampling.agreement(old, new).outcome == "pass"
    plain = completion_logps(model, samples)
    fails(sampling.agreement(old, plain), "log-probs", "nats apart on 32 tokens")
    said = sampling.start_numbers(old, new, plain)
    assert said["ratio"] == (pytest.approx(1.0, abs=1e-5), 1.0)
    expected = torch.cat([(q - p).exp() - 1 - (q - p) for p, q in zip(new, plain, strict=True)]).mean()
    assert said["kl_ref"] == (pytest.approx(float(expected), rel=1e-5), 0.0) and expected > 0.01
    fails(models.card(said), "step-0 card", "kl_ref is ")
    assert models.card(sampling.start_numbers(old, new, new)).outcome == "pass"


def test_groups_that_teach_nothing_and_answers_that_never_end(rollouts):
    ended = [dataclasses.replace(r, finish_reason="stop") for r in rollouts]
    assert sampling.groups(torch.tensor([0.0, 1.0, 0.0, 0.0]), 2, ended).outcome == "pass"
    equal = sampling.groups(torch.tensor([0.0, 0.0, 1.0, 1.0]), 2, ended)
    assert equal.outcome == "warn" and "2 of 2 groups have equal rewards" in equal.told
    cut = sampling.groups(torch.tensor([0.0, 1.0, 0.0, 0.0]), 2, rollouts)
    assert cut.outcome == "warn" and "4 of 4 answers are cut" in cut.told and "stop token" in cut.fix


def losses(model, wrong: str):
    """SFT's loss of a part over the whole's tokens; or over the part's own, or with a scaled gradient."""

    def loss(part, whole):
        batch, own, rows = collate(part), wrong == "mean of means", len(part)
        logps = model.logps(batch.input_ids, batch.target_ids, mask=batch.completion_mask)
        denom = sum(sum(s.mask) for s in (part if own else whole)) * (len(whole) / rows if own else 1)
        value = aggregate(sft_loss(logps), batch.completion_mask, mode="token_mean", denom=denom)
        return rows * value - (rows - 1) * value.detach() if wrong == "scaled" else value

    return loss


@pytest.mark.parametrize("wrong", ["", "mean of means", "scaled"])
def test_a_gradient_that_depends_on_micro_batches(hub, model, wrong):
    rows = [s for text in ("b", "hello hello", "to") for s in record_samples(load_chat(hub), talk("a", text))]
    one, many = (models.gradient(model, losses(model, wrong), rows, rows, size=size) for size in (3, 1))
    assert one.passes == 1 and many.passes == 3
    assert all(parameter.grad is None for parameter in model.parameters())
    check = models.micro_batches(one, many, rows=3)
    if wrong:
        fails(check, "micro-batch", "gradient")
    assert wrong or check.outcome == "pass"
    assert one.loss > 1 and one.grads[0].abs().max() > 0
    assert models.micro_batches(one, None, rows=3).outcome == "n/a"
    still = models.Gradient(1.0, [torch.zeros(3)], 1)
    assert models.micro_batches(still, still, rows=3).outcome == "warn"


@pytest.mark.parametrize("name", ["nanopost", "grpo", "gspo", "cispo"])
def test_the_gradient_of_a_variant_is_that_of_its_rows_one_by_one(model, rollouts, name):
    rows, loss = list(enumerate(rollouts)), sampling.rollout_loss(model, VARIANTS[name], {"temperature": 2.0})
    one, many = (models.gradient(model, loss, rows, rows, size=size) for size in (4, 1))
    assert models.micro_batches(one, many, rows=4).outcome == "pass"
    assert max(float(grad.abs().max()) for grad in one.grads) > 1e-3


def test_a_first_line_that_is_not_what_it_must_be():
    assert models.card({"loss": (math.log(2), math.log(2))}).outcome == "pass"
    fails(models.card({"loss": (0.75, math.log(2))}), "step-0 card", "loss is 0.75, it must be 0.6931")
    fails(models.card({"loss": (math.inf, math.nan)}), "step-0 card", "a finite number")
    assert models.card({"loss": (3.0, math.nan)}, guess=5.6).outcome == "pass"
    assert models.card({"loss": (8.0, math.nan)}, guess=5.6).outcome == "warn"


def test_a_run_that_does_not_fit():
    fit = Fit(True, need=100, memory=120, micro_batch=8, slots=0, sentence="100 of 120")
    assert models.memory(fit, slots=True).outcome == "pass"
    near = dataclasses.replace(fit, fits=False, memory=90, micro_batch=2, slots=5)
    close = models.memory(near, slots=True)
    assert close.outcome == "warn" and close.fix == "--micro-batch 2 --slots 5"
    assert models.memory(near, slots=False).fix == "--micro-batch 2"  # a script without the flag
    far = dataclasses.replace(fit, fits=False, memory=80, micro_batch=0)
    fails(models.memory(far, slots=True), "memory", "100 of 120")


def test_a_preference_line_at_the_start():
    line = {"loss": 1.2, "margin": 0.0, "kl_from_ref": 0.0, "sft": 5.0, "accuracy": 0.5}
    said = models.preference_numbers(line, math.log(2), 0.1)
    assert said == {"loss": (1.2, math.log(2) + 0.5), "margin": (0.0, 0.0), "kl_from_ref": (0.0, 0.0)}
    fails(models.card(said | {"margin": (0.2, 0.0)}), "step-0 card", "it must be")


def test_evaluation_prompts_that_are_trained_on(tmp_path):
    chats, held = write_chats(tmp_path / "chats.jsonl", 6), tmp_path / "held.jsonl"
    long = "how many of the twelve red apples are left after two days"
    fresh = {"question": "what is the sum of three numbers that nobody has ever asked for", "answer": "1"}
    held.write_text(json.dumps(fresh) + "\n")
    assert overlap(chats, held).outcome == "pass"
    assert overlap(chats, None).outcome == "n/a"
    with open(chats, "a") as file:
        file.write(json.dumps({"prompt": f"Tell me: {long.upper()}, please?", "completion": "ten"}) + "\n")
    system = {"role": "system", "content": fresh["question"]}
    said = [system, {"role": "user", "content": long}, {"role": "assistant", "content": "none of it at all"}]
    held.write_text(json.dumps(fresh) + "\n" + json.dumps({"messages": said}) + "\n")
    seen = overlap(chats, held)
    assert seen.outcome == "warn" and seen.told.startswith(f"{held}:2: 1 of 2 evaluation prompts")


def test_tokens_that_are_trained_on_are_shown_in_brackets(hub):
    chat = load_chat(hub)
    (shown,) = record_samples(chat, talk("hello", "hello 1"))
    prompt = "<|im_start|>user\\nhello<|im_end|>\\n<|im_start|>assistant\\n"
    assert data.bracketed(chat, shown) == f"{prompt}[hello][ ][1][<|im_end|>]"


def test_lines_and_file_have_every_check_in_order(tmp_path, capsys):
    found = [Check("bos", "fail", "chats.jsonl:3: twice", "once"), Check("rows", "pass", "read")]
    tell(tmp_path, found, seconds=0.5)
    lines = capsys.readouterr().out.splitlines()
    page = json.loads((tmp_path / "preflight.json").read_text())
    assert [check["name"] for check in page["checks"]] == list(CHECKS) and len(lines) == len(CHECKS) == 16
    assert page["passed"] is False and page["seconds"] == 0.5
    assert lines[3].split() == ["fail", "bos", "chats.jsonl:3:", "twice;", "once"]
    assert agree(found) == found  # of one rank


def test_sentences_come_where_they_are_asked_for(hub):
    @dataclasses.dataclass(frozen=True)
    class Flags(LoRA):
        batch_size: int = 32
        ref_model: None = None

    chat, options = load_chat(hub), {"packed": False, "sampled": False, "variant": None}
    plain = sentences(Flags(), chat, starts=math.nan, **options)
    assert plain == ["a step is 32 rows; micro-batches and ranks change nothing"]
    more = sentences(Flags(lora_rank=2), chat, starts=math.log(2), **options)
    assert {*more} - {*plain} == {
        "the loss starts at 0.6931",
        "the reference is the base with the adapter that training starts from, not the bare base",
    }
