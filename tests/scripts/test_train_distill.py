"""train_distill.py on a teacher that fine-tuning has taught a few chats, and a student of another width.

Most runs are the script in this process, without the report; two ranks and one run of each kind a user starts
are processes of their own.
"""

import dataclasses
import io
import json
import math
import runpy
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanopost import metrics
from nanopost.data.chat import load_chat, prompt_ids, prompt_messages, record_samples, write_chat
from nanopost.data.order import step_indices
from nanopost.data.schema import Sample, read_jsonl
from nanopost.models.weights import load_model, random_model, save_model, write_config
from nanopost.rollout.sampler import row_uniforms, sample
from nanopost.rollout.types import Rollout
from tests.chat_fixtures import byte_tokenizer, make_chat
from tests.ranks import run_script
from tests.tiny import TINY, hub_folder, write_chats
from tests.tolerances import within

ROOT = Path(__file__).resolve().parents[2]
MODES = ("text", "logits", "on-policy")
DIVERGENCES = {
    "forward": ["--divergence", "forward"],
    "reverse": ["--divergence", "reverse"],
    "jsd": ["--divergence", "jsd", "--jsd-beta", "0.3"],
    "top-k": ["--divergence", "forward", "--top-k-teacher", "5"],
}
Start = tuple[Path, Path, Path]  # student, teacher, data


def run_here(script: str, *flags: object) -> str:
    """A script with these flags, in this process and without its report; what it printed."""
    argv, printed = [script, *map(str, flags), "--threads", "1"], io.StringIO()
    page = patch("nanopost.export.offer_report", lambda run: run / "report.html")
    with patch.object(sys, "argv", argv), page, redirect_stdout(printed):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return printed.getvalue()


def flags_of(start: Start, mode: str, out: Path, *flags: object) -> list[str]:
    student, teacher, data = start
    fixed = [
        "--mode",
        mode,
        "--model",
        student,
        "--data",
        data,
        "--out",
        out,
        "--lr",
        "1e-2",
        "--warmup",
        "2",
    ]
    fixed += ["--teacher", teacher] * ("--no-teacher" not in flags) + ["--steps", "4", "--batch-size", "8"]
    fixed += ["--max-new-tokens", "12"] * (mode != "logits" and "--no-teacher" not in flags)
    return [str(flag) for flag in (*fixed, *flags) if flag != "--no-teacher"]


def train(start: Start, mode: str, out: Path, *flags: object) -> str:
    return run_here("train_distill.py", *flags_of(start, mode, out, *flags))


def records(run: Path) -> list[dict]:
    times = ("seconds", "rollout_s")
    return [{k: v for k, v in record.items() if k not in times} for record in metrics.read_records(run)]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model/model.safetensors")


def small_folder(folder: Path, *, seed: int = 0, kind: str = "chatml", vocab: int = 0) -> Path:
    """A student of its own width, with one layer; `vocab` rows more than the tokenizer has tokens."""
    chat = make_chat(folder, kind)
    size = chat.tokenizer.get_vocab_size() + vocab
    config = dataclasses.replace(
        TINY, vocab_size=size, hidden_size=12, num_hidden_layers=1, max_position_embeddings=256
    )
    write_config(config, folder, dtype=torch.float32, stop_ids=chat.stop_ids)
    save_model(config, random_model(folder, seed=seed).state_dict(), folder, stop_ids=chat.stop_ids)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A random student, a teacher that has learnt the chats, and the chats, of ragged lengths."""
    folder = tmp_path_factory.mktemp("distill")
    data = write_chats(folder / "chats.jsonl", 24)
    flags = ["--steps", "60", "--batch-size", "24", "--lr", "1e-2", "--warmup", "5"]
    teacher = hub_folder(folder / "hub", seed=1)
    run_here("train_sft.py", "--model", teacher, "--data", data, "--out", folder / "sft", *flags)
    return small_folder(folder / "student"), folder / "sft/model", data


# ---- what a run leaves


def test_text_is_written_down_with_its_origin_and_learnt(start, tmp_path):
    """The teacher's words under another tokenizer; what is written is a file that train_sft.py reads."""
    student, teacher, data = start
    student = small_folder(tmp_path / "header", kind="header")
    run, flags = (
        tmp_path / "run",
        ["--samples", "2", "--temperature", "0.9", "--top-p", "0.95", "--steps", "12"],
    )
    command = flags_of((student, teacher, data), "text", run, "--eval-data", data, *flags)
    printed = run_script(["train_distill.py", *command, "--threads", "1"], ranks=1)
    assert {path.name for path in run.iterdir()} >= {"args.json", "env.json", "model", "report.html"}
    told, written = records(run), read_jsonl(run / "teacher.jsonl")
    assert told[-1]["loss"] < 0.8 * told[0]["loss"] and told[-1]["eval_loss"] < told[0]["loss"]
    assert "kl" not in told[0]  # a black box shows no logits
    left = 48 - len(written)
    assert (f"left out {left} of 48 texts" in printed) == (left > 0) and len(written) > 24
    speaker = load_chat(teacher)
    decoding = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 12, "samples": 2, "seed": 0}
    (named,) = json.loads((run / "env.json").read_text())["teachers"]
    assert named["template"] == speaker.version and named["decoding"] == decoding
    assert named["teacher"].startswith(f"{teacher}@")
    prompts, answers = {prompt_messages(record) for record in read_jsonl(data)}, set()
    for record in written:
        assert {key: record.meta[key] for key in named} == named and record.answer is not None
        assert prompt_messages(record) in prompts
        answers.add(record.messages[-1].content)
        (one,) = record_samples(load_chat(student), record)  # in the student's tokens
        assert load_chat(student).tokenizer.decode(one.ids[:-1]).endswith(record.messages[-1].content.strip())
    assert len(answers) > 5
    # What a teacher elsewhere has written says so itself, and trains the same student the same way.
    again = (student, teacher, run / "teacher.jsonl")
    train(again, "text", tmp_path / "again", "--no-teacher", "--steps", "12")
    assert [r["loss"] for r in records(tmp_path / "again")] == [r["loss"] for r in told]
    assert json.loads((tmp_path / "again/env.json").read_text())["teachers"] == [named]


def test_texts_without_an_end_are_left_out_and_counted(start, tmp_path):
    """What is written is what the sampler says, each text under its own prompt."""
    _, teacher, data = start
    flags = ["--steps", "1", "--temperature", "1.5", "--top-p", "0.9", "--samples", "2"]
    printed = train(start, "text", tmp_path / "run", *flags)
    kept = read_jsonl(tmp_path / "run/teacher.jsonl")
    assert f"left out {48 - len(kept)} of 48 texts" in printed and len(kept) < 48
    chat, model, given = load_chat(teacher), load_model(teacher), read_jsonl(data)
    prompts = [prompt_ids(chat, prompt_messages(record)) for record in given]
    uniforms = row_uniforms(seed=0, step=0, prompts=range(24), group_size=2, count=12)
    options = {"max_new_tokens": 12, "stop_ids": chat.stop_ids, "temperature": 1.5, "uniforms": uniforms}
    options |= {"top_p": 0.9}
    wanted = []
    for n, rollout in enumerate(sample(model, prompts, group_size=2, **options)):
        text = chat.tokenizer.decode(list(rollout.completion_ids[:-1]), skip_special_tokens=False)
        if rollout.finish_reason == "stop" and text.strip():
            wanted.append((prompt_messages(given[n // 2]), text))
    assert [(prompt_messages(record), record.messages[-1].content) for record in kept] == wanted


def test_a_text_that_cannot_be_learnt_is_left_out_and_the_run_goes_on(start, tmp_path):
    """The student's template refuses one; another quotes the student's stop token, which is text."""
    student, chat = small_folder(tmp_path / "header", kind="header"), load_chat(start[1])
    template = student / "chat_template.jinja"
    refusal = "{% for m in messages if 'never' in m.content %}{{ raise_exception('never') }}{% endfor %}"
    template.write_text(refusal + template.read_text())
    lines = [chat.tokenizer.encode(text).ids for text in ("never it is 7", "so<|eot|> it is 7")]

    def tell(*given: object, **options: object) -> list[Rollout]:
        done = sample(*given, **options)
        for i, line in enumerate(lines):
            ids = (*line, chat.stop_ids[0])
            zeros = torch.zeros(len(ids))
            done[i] = Rollout(done[i].prompt_ids, ids, zeros, zeros, "stop")
        return done

    with patch("nanopost.rollout.sampler.sample", tell):
        printed = train((student, *start[1:]), "text", tmp_path / "run", "--steps", "1")
    kept, told = read_jsonl(tmp_path / "run/teacher.jsonl"), (tmp_path / "run/teacher.jsonl").read_text()
    assert f"left out {24 - len(kept)} of 24 texts (first: " in printed
    assert "chats.jsonl:1: " in printed and "the chat template refuses the messages: never" in printed
    assert len(kept) > 12 and "never" not in told and "so<|eot|> it is 7" in told


def test_a_rank_that_does_not_write_hears_of_no_texts_as_well(start, tmp_path):
    """Not only the one that writes: it would wait for the others at the barrier, and they for it."""
    told = r"teacher.jsonl: none of 24 texts can be learnt from \(first: .*chats.jsonl:1: cut at max_new"
    with (
        patch("nanopost.distributed.is_main", lambda: False),
        pytest.raises(ValueError, match=told),
    ):
        train(start, "text", tmp_path / "run", "--max-new-tokens", "1")


def test_from_scratch_draws_the_weights_of_the_seed(start, tmp_path):
    """And gradients clipped to nothing leave the decay alone: θ ← θ − lr·λ·θ on matrices."""
    flags = ["--steps", "1", "--from-scratch", "--seed", "3", "--warmup", "1"]
    flags += ["--weight-decay", "0.5", "--max-grad-norm", "1e-14"]
    train(start, "logits", tmp_path / "run", *flags)
    for name, tensor in random_model(start[0], seed=3).state_dict().items():
        share = 1 - 0.01 * 0.5 if tensor.ndim == 2 else 1.0
        torch.testing.assert_close(weights(tmp_path / "run")[name], share * tensor, rtol=1e-6, atol=1e-7)


# ---- the numbers


def float64(folder: Path):
    return load_model(folder, dtype=torch.float64)


def log_p(model, one: Sample, temperature: float = 1.0) -> Tensor:
    """log p at the supervised places of one sample, a row for each; by itself, without padding."""
    logits = model(torch.tensor([one.ids[:-1]]))[0][torch.tensor(one.mask[1:])]
    return (logits / temperature).log_softmax(-1)


def divergence_of(name: str, s: Tensor, t: Tensor) -> Tensor:
    """The definitions, written out: (N, V) log-probabilities in, (N,) out."""
    if name == "reverse":
        return (s.exp() * (s - t)).sum(-1)
    if name == "jsd":
        m = (0.3 * t.exp() + 0.7 * s.exp()).log()
        return 0.3 * (t.exp() * (t - m)).sum(-1) + 0.7 * (s.exp() * (s - m)).sum(-1)
    if name == "top-k":
        p, q = t.exp(), s.exp()
        best = p.topk(5).indices
        p, q = p.gather(-1, best), q.gather(-1, best)
        rest, other = 1 - p.sum(-1), 1 - q.sum(-1)
        return (p * (p / q).log()).sum(-1) + rest * (rest / other).log()
    return (t.exp() * (t - s)).sum(-1)


def expected(start: Start, samples: list[Sample], name: str, temperature: float) -> dict[str, float]:
    """The line of one step over the samples, by float64 and one sample after the other."""
    student, teacher = float64(start[0]), float64(start[1])
    loss = kl = same = tokens = 0.0
    for one in samples:
        with torch.no_grad():
            t, t1 = log_p(teacher, one, temperature), log_p(teacher, one)
            s1 = log_p(student, one)
            kl += float((t1.exp() * (t1 - s1)).sum())
            same += float((t1.argmax(-1) == s1.argmax(-1)).sum())
        loss += temperature**2 * divergence_of(name, log_p(student, one, temperature), t).sum()
        tokens += sum(one.mask)
    (loss / tokens).backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm().item()
    told = {"loss": float(loss.detach()) / tokens, "kl": kl / tokens, "agreement": same / tokens}
    return told | {"grad_norm": norm, "tokens": tokens}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_line_is_what_float64_says(start, tmp_path, name):
    """Ragged samples in micro-batches of 5: a prompt that counts, a mean of means, another τ would show."""
    flags = ["--steps", "1", "--batch-size", "24", "--micro-batch", "5", "--kd-temperature", "2"]
    train(start, "logits", tmp_path / "run", *flags, *DIVERGENCES[name])
    chat = load_chat(start[0])
    samples = [one for record in read_jsonl(start[2]) for one in record_samples(chat, record)]
    (told,) = records(tmp_path / "run")
    for key, value in expected(start, samples, name, 2.0).items():
        assert told[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("name", ["default", "jsd"])
def test_on_policy_the_teacher_scores_the_students_own_tokens(start, tmp_path, name):
    """Both at the sampler's temperature, on the very tokens it drew; the default is the reverse KL."""
    flags = ["--steps", "1", "--batch-size", "24", "--micro-batch", "5", "--temperature", "1.5"]
    flags += ["--top-p", "0.8"] * (name == "jsd")
    train(start, "on-policy", tmp_path / "run", *flags, *DIVERGENCES.get(name, []))
    chat, (told,) = load_chat(start[0]), records(tmp_path / "run")
    prompts = [prompt_ids(chat, prompt_messages(record)) for record in read_jsonl(start[2])]
    order = step_indices(seed=0, step=0, batch_size=24, size=24)
    uniforms = row_uniforms(seed=0, step=0, prompts=range(24), group_size=1, count=12)
    options = {"max_new_tokens": 12, "stop_ids": chat.stop_ids, "temperature": 1.5, "uniforms": uniforms}
    options |= {"top_p": 0.8} if name == "jsd" else {}
    drawn = sample(load_model(start[0]), [prompts[i] for i in order], **options)
    wanted = expected(start, [r.sample for r in drawn], "reverse" if name == "default" else name, 1.5)
    for key, value in wanted.items():
        assert told[key] == pytest.approx(value, rel=1e-4), key
    assert told["length"] == pytest.approx(wanted["tokens"] / 24)


@pytest.mark.parametrize("mode", ["logits", "on-policy"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_teacher_itself_has_nothing_to_learn(start, tmp_path, mode, name):
    """The step-0 card, at τ = 2: loss, KL and gradient are 0 up to the rounding of float32."""
    start = (start[1], start[1], start[2])
    train(start, mode, tmp_path / "run", "--steps", "1", "--kd-temperature", "2", *DIVERGENCES[name])
    (told,) = records(tmp_path / "run")
    assert abs(told["loss"]) < 1e-6 and told["grad_norm"] < 1e-5
    assert abs(told["kl"]) < 1e-6 and told["agreement"] == 1.0


def test_the_teacher_itself_has_nothing_to_learn_at_the_samplers_temperature(start, tmp_path):
    start = (start[1], start[1], start[2])
    train(start, "on-policy", tmp_path / "run", "--steps", "1", "--temperature", "0.7")
    (told,) = records(tmp_path / "run")
    assert abs(told["loss"]) < 1e-6 and told["grad_norm"] < 1e-5 and told["tokens"] > 8


@pytest.mark.parametrize("mode", ["logits", "on-policy"])
def test_the_student_comes_closer(start, tmp_path, mode):
    train(start, mode, tmp_path / "run", "--steps", "40", "--eval-data", start[2], "--eval-every", "20")
    told = records(tmp_path / "run")
    assert told[-1]["kl"] < 0.5 * told[0]["kl"] and told[-1]["agreement"] > told[0]["agreement"]
    assert told[39]["eval_kl"] < told[19]["eval_kl"] < told[0]["kl"]
    assert told[39]["eval_loss"] < told[19]["eval_loss"] and 0 < told[39]["eval_agreement"] <= 1


def test_the_hidden_states_train_student_and_projection_and_nothing_else(start, tmp_path):
    """One step against float64: loss, gradient of both, and a teacher that stays as it was."""
    flags = ["--steps", "1", "--batch-size", "24", "--micro-batch", "7", "--hidden-weight", "0.5"]
    before = (start[1] / "model.safetensors").read_bytes()
    train(start, "logits", tmp_path / "run", *flags, "--eval-data", start[2])
    student, teacher, chat = float64(start[0]), float64(start[1]), load_chat(start[0])
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(12, 20, generator=generator) / math.sqrt(12)
    w = first.double().requires_grad_()
    loss = tokens = 0.0
    for record in read_jsonl(start[2]):
        for one in record_samples(chat, record):
            ids, mask = torch.tensor([one.ids[:-1]]), torch.tensor(one.mask[1:])
            with torch.no_grad():
                states, t = teacher.model.rows(ids)[0][mask], log_p(teacher, one)
            own = student.model.rows(ids)[0][mask]
            loss += divergence_of("forward", log_p(student, one), t).sum()
            loss += 0.5 * (own @ w - states).square().mean(-1).sum()
            tokens += sum(one.mask)
    (loss / tokens).backward()
    norm = torch.stack([p.grad.norm() for p in (*student.parameters(), w)]).norm().item()
    (told,) = records(tmp_path / "run")
    assert told["loss"] == pytest.approx(float(loss.detach()) / tokens, rel=1e-4)
    assert told["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert told["eval_loss"] == told["eval_kl"]  # an evaluation is without the hidden states
    state = load_file(tmp_path / "run/state/step_000001/model.safetensors")
    projection = state.pop("model.projection")
    assert (projection - first).abs().max() > 1e-3  # it learns
    assert set(weights(tmp_path / "run")) == set(state)  # and is thrown away
    assert (start[1] / "model.safetensors").read_bytes() == before
    load_model(tmp_path / "run/model")


def test_the_datas_own_tokens_take_their_share(start, tmp_path):
    """Linear in α between the divergence alone and train_sft.py's loss."""
    for share in ("0", "0.25", "1"):
        train(start, "logits", tmp_path / share, "--steps", "1", "--batch-size", "24", "--sft-weight", share)
    flags = ["--steps", "1", "--batch-size", "24"]
    run_here("train_sft.py", "--model", start[0], "--data", start[2], "--out", tmp_path / "sft", *flags)
    kd, mixed, data = (records(tmp_path / share)[0]["loss"] for share in ("0", "0.25", "1"))
    assert data == pytest.approx(records(tmp_path / "sft")[0]["loss"], rel=1e-6)
    assert mixed == pytest.approx(0.75 * kd + 0.25 * data, rel=1e-6) and abs(kd - data) > 0.1


# ---- the machinery

EXTRA = {
    "text": [],
    "logits": [*DIVERGENCES["jsd"], "--hidden-weight", "0.5", "--sft-weight", "0.25"],
    "on-policy": ["--temperature", "1.3", "--hidden-weight", "0.5"],
}


@pytest.mark.parametrize("mode", MODES)
def test_resume_continues_bit_for_bit(start, tmp_path, mode):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train(start, mode, straight, "--save-every", "2", *EXTRA[mode])
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "state/step_000004")  # as if it had died after step 2
    shutil.rmtree(cut / "model")
    with pytest.raises(ValueError, match="pass --resume to go on"):
        train(start, mode, cut, "--save-every", "2", *EXTRA[mode])
    train(start, mode, cut, "--save-every", "2", "--resume", *EXTRA[mode])
    assert records(cut) == records(straight) and len(records(cut)) == 4
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(cut).items())
    if mode == "text":
        with pytest.raises(ValueError, match=r"teachers: .* was started with"):
            train(start, mode, cut, "--resume", "--temperature", "0.5")
        other = write_chats(tmp_path / "other.jsonl", 24, seed=1)
        with pytest.raises(ValueError, match=r"data: .* was started with"):
            train((*start[:2], other), mode, cut, "--resume")
    else:
        another = "on-policy" if mode == "logits" else "logits"
        with pytest.raises(ValueError, match=f"mode: .* was started with '{mode}', this start has"):
            train(start, another, cut, "--resume")
        with pytest.raises(ValueError, match=r"divergence: .* was started with"):
            train(start, mode, cut, "--resume", "--divergence", "forward")


# Several runs in one process group: importing torch takes longer than they do.
RUNS = """
import json, runpy, sys
import nanopost.export
from nanopost import distributed
nanopost.export.offer_report = lambda run: run
distributed.setup()
leave, distributed.setup, distributed.teardown = distributed.teardown, lambda *_: None, distributed.barrier
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
leave()
"""


@pytest.fixture(scope="module")
def shared_out(start, tmp_path_factory) -> Path:
    """Every mode on one process, in other micro-batches, and on two ranks; the evaluation has one record."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "one.jsonl").write_text(start[2].read_text().splitlines()[0] + "\n")
    (folder / "odd.jsonl").write_text("\n".join(start[2].read_text().splitlines()[:21]) + "\n")
    commands = []
    for mode in MODES:
        begin = (start[0], start[1], folder / "odd.jsonl")
        flags = [*EXTRA[mode], "--eval-data", folder / "one.jsonl", *(["--samples", "2"] * (mode == "text"))]
        train(begin, mode, folder / f"{mode}-one", *flags)
        train(begin, mode, folder / f"{mode}-micro", *flags, "--micro-batch", "3")
        command = flags_of(begin, mode, folder / f"{mode}-ranks", *flags, "--micro-batch", "2")
        commands.append(["train_distill.py", *command, "--threads", "1"])
    run_script(["-c", RUNS, json.dumps(commands)], ranks=2)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_and_ranks_change_nothing(shared_out, start, mode):
    one, first = shared_out / f"{mode}-one", weights(shared_out / f"{mode}-one")
    before = load_file(start[0] / "model.safetensors")
    assert all((first[name] - before[name]).abs().max() > 1e-3 for name in before)  # everything was trained
    micro, ranks = (shared_out / f"{mode}-{other}" for other in ("micro", "ranks"))
    within("micro-batches, float32", [weights(micro), records(micro)], [first, records(one)])
    within("world sizes, float32", [weights(ranks), records(ranks)], [first, records(one)])
    if mode == "text":
        text = (one / "teacher.jsonl").read_bytes()
        assert (shared_out / "text-ranks/teacher.jsonl").read_bytes() == text


# ---- what is refused


def test_another_tokenizer_is_refused_with_what_to_do(start, tmp_path):
    _, teacher, data = start
    other = small_folder(tmp_path / "other", kind="header")
    for mode in ("logits", "on-policy"):
        with pytest.raises(
            ValueError, match=r"tokenizers of model .*other and teacher .* differ in 7 tokens"
        ) as told:
            train((other, teacher, data), mode, tmp_path / "run")
        assert "'<|bos|>', id 264 and None" in str(told.value)
        assert "use --mode text, or retrain the student with the teacher's tokenizer" in str(told.value)
    assert not (tmp_path / "run").exists()


def test_the_padding_of_a_vocabulary_is_nobodys_business(start, tmp_path):
    """Student and teacher have one tokenizer and embeddings of different sizes, as Qwen2.5's 0.5B and 7B."""
    wide = small_folder(tmp_path / "wide", vocab=6)
    for mode in ("logits", "on-policy"):
        train((wide, *start[1:]), mode, tmp_path / mode, "--steps", "1")
        (record,) = metrics.read_records(tmp_path / mode)
        assert 0 < record["kl"] < 20
        weights = load_file(tmp_path / mode / "model/model.safetensors")
        assert weights["model.embed_tokens.weight"].shape[0] == 272


def test_another_tokenizer_of_the_same_size_is_refused(start, tmp_path):
    student = small_folder(tmp_path / "student")
    special = ["<|im_end|>", "<|im_start|>"]  # the other way round
    write_chat(student, byte_tokenizer(special), load_chat(start[0]).template, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=r"differ in 2 tokens \(first '<\|im_end\|>', id 264 and 265\)"):
        train((student, *start[1:]), "logits", tmp_path / "run")


def test_a_teacher_that_stops_where_the_student_does_not_is_refused(start, tmp_path):
    """The other way round is no harm; and the text of such a teacher can be learnt."""
    both = [load_chat(start[1]).tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|im_start|>")]
    teacher = shutil.copytree(start[1], tmp_path / "teacher")
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": both}))
    told = r"the teacher stops at 264 \('<\|im_start\|>'\), the student does not: add them to eos_token_id in"
    for mode in ("logits", "on-policy"):
        with pytest.raises(ValueError, match=told):
            train((start[0], teacher, start[2]), mode, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train((start[0], teacher, start[2]), "text", tmp_path / "text", "--steps", "1")
    student = shutil.copytree(start[0], tmp_path / "student")
    shutil.copy(teacher / "generation_config.json", student)
    train((student, start[1], start[2]), "on-policy", tmp_path / "run", "--steps", "1")


UNREAD = [
    ("text", ["--divergence", "forward"]),
    ("text", ["--kd-temperature", "2"]),
    ("text", ["--hidden-weight", "0.1"]),
    ("text", ["--jsd-beta", "0.5"]),
    ("logits", ["--temperature", "1"]),
    ("logits", ["--samples", "1"]),
    ("logits", ["--max-new-tokens", "8"]),
    ("logits", ["--jsd-beta", "0.5"]),
    ("logits", ["--top-k-teacher", "4", "--divergence", "reverse"]),
    ("on-policy", ["--sft-weight", "0.1"]),
    ("on-policy", ["--max-length", "40"]),
    ("on-policy", ["--samples", "2"]),
    ("on-policy", ["--top-k-teacher", "4"]),
]


@pytest.mark.parametrize(("mode", "flags"), UNREAD, ids=lambda value: str(value))
def test_a_flag_that_nothing_reads_is_refused(start, tmp_path, mode, flags):
    name = flags[0].removeprefix("--").replace("-", "_")
    with pytest.raises(
        ValueError, match=rf"^{name} must not be given: {mode}.* do not read it, got {flags[1]}"
    ):
        train(start, mode, tmp_path / "run", *flags)


WRONG = [
    ("logits", ["--kd-temperature", "0"], "kd_temperature must be above 0, got 0"),
    ("logits", ["--divergence", "jsd", "--jsd-beta", "1.5"], "jsd_beta must be between 0 and 1, got 1.5"),
    ("logits", ["--sft-weight", "-1"], "sft_weight must be between 0 and 1, got -1"),
    ("logits", ["--top-k-teacher", "-1"], "top_k_teacher must be at least 0, got -1"),
    ("logits", ["--hidden-weight", "-1"], "hidden_weight must be at least 0, got -1"),
    ("logits", ["--batch-size", "0"], "batch_size must be at least 1, got 0"),
    ("logits", ["--epochs", "0"], "epochs must be above 0, got 0"),
    ("logits", ["--steps", "-1"], "steps must be at least 0, got -1"),
    ("text", ["--warmup", "-3"], "warmup must be at least 0, got -3"),
    ("logits", ["--final-lr", "2"], "final_lr must be between 0 and 1, got 2"),
    ("logits", ["--max-grad-norm", "0"], "max_grad_norm must be above 0, got 0"),
    ("logits", ["--max-length", "3"], "chats.jsonl: no sample of at most 3 tokens"),
    ("on-policy", ["--max-new-tokens", "250"], r"chats.jsonl:1: the prompt has \d+ tokens, 6 leave room"),
    ("on-policy", ["--top-p", "2"], "top_p must be between 0 and 1, got 2"),
    ("text", ["--samples", "0"], "samples must be at least 1, got 0"),
]


@pytest.mark.parametrize(("mode", "flags", "message"), WRONG, ids=lambda value: str(value))
def test_bad_input_is_named(start, tmp_path, mode, flags, message):
    with pytest.raises(ValueError, match=message):
        train(start, mode, tmp_path / "run", *flags)
    assert not (tmp_path / "run/teacher.jsonl").exists()  # before anything is sampled


def test_a_teacher_is_always_known(start, tmp_path):
    student, teacher, data = start
    for mode in ("logits", "on-policy"):
        with pytest.raises(ValueError, match=f"teacher must be given with mode={mode}"):
            train(start, mode, tmp_path / "run", "--no-teacher")
    with pytest.raises(ValueError, match=r"temperature must not be given: text"):
        train(start, "text", tmp_path / "run", "--no-teacher", "--temperature", "1")
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    named = [line | {"teacher": "other", "decoding": {"temperature": 0.2}} for line in lines]
    for key, value in (("teacher", None), ("decoding", {}), ("decoding", "greedy"), ("teacher", 7)):
        bad = [*named[:2], named[2] | {key: value}, *named[3:]]
        path = tmp_path / "named.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in bad))
        with pytest.raises(ValueError, match=rf"named.jsonl:3: without --teacher '{key}' must say whose"):
            train((student, teacher, path), "text", tmp_path / "run", "--no-teacher")


def test_too_long_samples_are_counted_not_lost_in_silence(start, tmp_path):
    printed = train(start, "logits", tmp_path / "run", "--max-length", "40", "--steps", "1")
    assert "left out" in printed and "chats.jsonl:" in printed


# ---- learning


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", MODES)
def test_the_student_comes_near_the_teacher(start, tmp_path, mode, seed):
    """From about 4 nats a token; 32 texts a prompt tell less of a distribution than its logits do."""
    student = small_folder(tmp_path / "student", seed=seed)
    sampling = [] if mode == "logits" else ["--temperature", "1"]
    flags = ["--steps", "300", "--batch-size", "24", "--seed", seed, *sampling]
    flags += ["--samples", "32"] * (mode == "text")
    train((student, start[1], start[2]), mode, tmp_path / "run", *flags)
    model, teacher, chat = float64(tmp_path / "run/model"), float64(start[1]), load_chat(start[1])
    kls = []
    with torch.no_grad():
        for record in read_jsonl(start[2]):
            (one,) = record_samples(chat, record)
            t, s = log_p(teacher, one), log_p(model, one)
            kls.append(float((t.exp() * (t - s)).sum(-1).mean()))
    assert sum(kls) / len(kls) < (0.3 if mode == "text" else 0.1)
