"""Candidates: groups of samples from a model, judged, and the data sets made of them.

    python -m nanopost.evals.candidates --model runs/sft/model --data prompts.jsonl \\
        --verifier nanopost.rewards.math:gsm8k --rule right_and_concise --out pairs.jsonl
    python -m nanopost.evals.candidates --groups groups.jsonl --rule right_over_wrong --out pairs.jsonl

Groups are sampled from --model, or read from a file: one that --groups-out wrote, or GSM8K's published
model solutions. What comes of them, one flag each: preference pairs (--out), outcome labels (--labels-out)
and supervised records (--sft-out). docs/preference-data.md has the forms and the rules.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from nanopost.atomic import replace_file
from nanopost.data.chat import Chat, decode, encode, load_chat, prompt_ids, prompt_messages
from nanopost.data.preference import group_line, preference_line, read_groups
from nanopost.data.schema import Candidate, Group, Provenance, Record, read_jsonl
from nanopost.evals.verifier import Verifier, is_right, load_verifier
from nanopost.models.weights import load_model
from nanopost.rollout.pairs import RULES, build_labels, build_pairs, describe_pairs
from nanopost.rollout.sampler import row_uniforms, sample
from nanopost.rollout.select import FILTERS, KEEP, informative, rejection_sample
from nanopost.rollout.types import Rollout

SAMPLING: dict[str, tuple[Any, Any, str]] = {  # flag: type, default, help
    "group_size": (int, 8, "samples a prompt"),
    "temperature": (float, 1.0, "of the sampler"),
    "top_k": (int, 0, "0: off"),
    "top_p": (float, 1.0, "1: off"),
    "max_new_tokens": (int, 256, "completions are cut there"),
    "seed": (int, 0, "of the sampler's uniforms"),
    "slots": (int, 256, "rows decoded at a time"),
}
CHOICES: dict[str, Any] = {"rule": RULES, "keep": KEEP, "drop": FILTERS}
FLAGS: dict[str, tuple[Any, Any, str]] = {
    "model": (Path, None, "folder in hub format; with --groups its tokenizer counts missing lengths"),
    "data": (Path, None, "JSONL of prompts with answers"),
    "verifier": (str, None, "gsm8k, math, ledger or MODULE:FUNCTION, called with completion and answer"),
    "groups": (Path, None, "JSONL of groups, instead of sampling"),
    **SAMPLING,
    "threads": (int, 0, "CPU threads; 0: torch's choice; 1 is fastest for tiny models"),
    "drop": (str, [], f"drop groups: {', '.join(FILTERS)}"),
    "rule": (str, None, f"how pairs are made: {', '.join(RULES)}"),
    "margin": (float, 0.0, "what a difference must exceed, in tokens or score"),
    "pairs_per_group": (int, None, "at most so many; default: all"),
    "out": (Path, None, "write preference pairs here"),
    "labels_out": (Path, None, "write outcome labels here"),
    "groups_out": (Path, None, "write the groups here, before they are filtered"),
    "keep": (str, None, f"what --sft-out keeps: {', '.join(KEEP)}"),
    "threshold": (float, 1.0, "least score that --keep best keeps"),
    "sft_out": (Path, None, "write the kept candidates here, as records for train_sft.py"),
}


def sample_groups(
    folder: str | Path,
    records: Sequence[Record],
    verify: Verifier,
    *,
    verifier_name: str,
    verifier_version: str | None = None,
    group_size: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    slots: int = 256,
) -> list[Group]:
    """Sample a group of completions for every record's prompt and judge each against the record's answer.

    Args:
        folder: the model, in hub format.
        records: prompts with answers; a last assistant turn is what is answered anew.
        verify: completion, answer -> Verdict with a part `correct` or `exact`.
        verifier_name, verifier_version: kept with every group.
        group_size, temperature, top_k, top_p, max_new_tokens, seed, slots: see `sampler.sample`. Samples
            depend on the place of their prompt in `records`, on nothing else.
    Returns: one group a record, in order; the record's other keys are in its `meta`. A completion cut at
        `max_new_tokens` is never right, whatever the verifier reads in it: the model did not end it there.
        Its score stays the verifier's, its reason says that it was cut, and no rule keeps or chooses it.
    Raises: ValueError `file:line: ...` for a record without an answer, or one that cannot be verified or
        rendered; before anything is sampled.
    """
    model, chat = load_model(folder), load_chat(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = [_prompt(chat, record, verify) for record in records]
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    places, count = range(len(prompts)), max_new_tokens
    uniforms = row_uniforms(seed=seed, step=0, prompts=places, group_size=group_size, count=count)
    options |= {"max_new_tokens": max_new_tokens, "group_size": group_size}
    rollouts = sample(model, prompts, stop_ids=chat.stop_ids, slots=slots, uniforms=uniforms, **options)
    options |= {"model": str(folder), "template": chat.version, "seed": seed}
    groups = []
    for i, record in enumerate(records):
        own = rollouts[i * group_size : (i + 1) * group_size]
        candidates = tuple(_candidate(chat, verify, rollout, record.answer) for rollout in own)
        provenance = Provenance(
            verifier_name=verifier_name,
            verifier_version=verifier_version,
            test_case_hash=sha256(json.dumps(record.answer, sort_keys=True).encode()).hexdigest()[:16],
            pass_rate=sum(bool(candidate.correct) for candidate in candidates) / group_size,
            sampling=options,
            meta=record.meta,
        )
        prompt = prompt_messages(record)
        groups.append(Group(prompt, candidates, provenance, record.answer, record.file, record.line))
    return groups


def count_tokens(group: Group, chat: Chat) -> Group:
    """The group with the length of every candidate that has none: its text's tokens and a stop token."""
    candidates = (
        c if c.tokens is not None else replace(c, tokens=len(encode(chat, c.text)) + 1)
        for c in group.candidates
    )
    return replace(group, candidates=tuple(candidates))


def sft_line(group: Group, candidate: Candidate, keep: str) -> dict[str, Any]:
    """A kept candidate as a prompt+completion record; what it was kept for stands beside it."""
    line = group_line(replace(group, candidates=(candidate,)))
    said = [{"role": "assistant", "content": candidate.text}]
    return {"prompt": line.pop("prompt"), "completion": said, "keep": keep, **line}


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line; a file without lines is an error, because nothing could be trained on it."""
    if not lines:
        raise ValueError(f"{path}: there is nothing to write; the counts above say why")
    path.parent.mkdir(parents=True, exist_ok=True)
    told = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    replace_file(path, "".join(told).encode())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: sample or read groups, filter them, write what was asked for and print the counts."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    start = time.perf_counter()
    if arguments.groups:
        groups = read_groups(arguments.groups)
        if arguments.model:
            chat = load_chat(arguments.model)
            groups = [count_tokens(group, chat) for group in groups]
    else:
        verify, version = load_verifier(arguments.verifier)
        settings = {name: getattr(arguments, name) for name in SAMPLING}
        settings |= {"verifier_name": arguments.verifier, "verifier_version": version}
        groups = sample_groups(arguments.model, read_jsonl(arguments.data), verify, **settings)
    if arguments.groups_out:
        write_lines(arguments.groups_out, [group_line(group) for group in groups])
    everything = [candidate for group in groups for candidate in group.candidates]
    right, seconds = sum(bool(c.correct and not c.cut) for c in everything), time.perf_counter() - start
    print(f"{len(groups)} groups, {len(everything)} candidates, {right} of them right, {seconds:.1f} s")
    if blank := sum(not c.text.strip() for c in everything):
        print(f"{blank} candidates are blank: they stay in their groups and are in no record")
    if cut := sum(bool(c.cut) for c in everything):
        print(f"{cut} candidates are cut: they are never right, never chosen and never kept")
    kept, dropped = informative(groups, drop=arguments.drop)
    for name, number in dropped.items():
        print(f"dropped by {name}: {number} groups")
    print(f"kept: {len(kept)} groups")
    if arguments.out:
        options = {"rule": arguments.rule, "margin": arguments.margin}
        made = [build_pairs(group, pairs_per_group=arguments.pairs_per_group, **options) for group in kept]
        pairs = [pair for some in made for pair in some]
        fruitful = f"{len(pairs)} from {sum(map(bool, made))} groups"
        print(f"pairs by {arguments.rule}, margin {arguments.margin:g}: {fruitful}")
        if pairs:
            print(describe_pairs(pairs))
        write_lines(arguments.out, [preference_line(pair) for pair in pairs])
    if arguments.labels_out:
        labels = [label for group in kept for label in build_labels(group)]
        print(f"labels: {len(labels)}, {sum(label.label for label in labels)} of them right")
        write_lines(arguments.labels_out, [preference_line(label) for label in labels])
    if arguments.sft_out:
        options = {"keep": arguments.keep, "threshold": arguments.threshold}
        chosen = [(group, candidate) for group in kept for candidate in rejection_sample(group, **options)]
        print(f"supervised records by {arguments.keep}: {len(chosen)}")
        write_lines(arguments.sft_out, [sft_line(*pair, arguments.keep) for pair in chosen])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags; what does not fit together is refused before anything is sampled."""
    parser = argparse.ArgumentParser(
        prog="python -m nanopost.evals.candidates",
        usage="%(prog)s (--model DIR --data FILE --verifier M:F | --groups FILE) ...",
        description=__doc__,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=110),
    )
    for name, (kind, default, text) in FLAGS.items():
        told = text if default in (None, []) else f"{text} [{default}]"
        options: dict[str, Any] = {"choices": CHOICES.get(name), "nargs": "+" if name == "drop" else None}
        sign = {Path: "PATH", str: "NAME"}.get(kind, "N")
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=sign, help=told, **options)
    arguments = parser.parse_args(argv)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    sampled = [name for name in ("data", "verifier", *SAMPLING) if name in given]
    outs = [given[name] for name in ("out", "labels_out", "groups_out", "sft_out") if name in given]
    if arguments.groups and sampled:
        parser.error(f"--groups reads groups; --{sampled[0].replace('_', '-')} is for sampling them")
    if not arguments.groups and not {"model", "data", "verifier"} <= given.keys():
        parser.error("give --model, --data and --verifier to sample groups, or --groups to read them")
    if not outs:
        parser.error("nothing is asked for: give --out, --labels-out, --groups-out or --sft-out")
    for one, other in (("out", "rule"), ("sft_out", "keep")):
        if (one in given) != (other in given):
            parser.error(f"--{one.replace('_', '-')} and --{other} come together")
    for one, other in (("margin", "out"), ("pairs_per_group", "out"), ("threshold", "keep best")):
        if one in given and other not in (*given, f"keep {arguments.keep}"):
            parser.error(f"--{one.replace('_', '-')} is for --{other}")
    if taken := [path for path in outs if path.exists() or outs.count(path) > 1]:
        parser.error(f"{taken[0]} is there already or given twice: choose another name")
    return argparse.Namespace(**{name: given.get(name, default) for name, (_, default, _) in FLAGS.items()})


def _prompt(chat: Chat, record: Record, verify: Verifier) -> list[int]:
    """The prompt's tokens; what cannot be verified is refused here, before the first sample."""
    try:
        if record.answer is None:
            raise ValueError("no answer to verify against")
        is_right(verify("", record.answer))
        return prompt_ids(chat, prompt_messages(record))
    except ValueError as error:
        raise ValueError(f"{record.file}:{record.line}: {error}") from error


def _candidate(chat: Chat, verify: Verifier, rollout: Rollout, answer: Any) -> Candidate:
    text, tokens = decode(chat, rollout.completion_ids), len(rollout.completion_ids)
    verdict, cut = verify(text, answer), rollout.finish_reason == "length"
    reason = f"cut at {tokens} tokens; {verdict.reason}" if cut else verdict.reason
    return Candidate(text, verdict.score, is_right(verdict) and not cut, tokens, reason, cut=cut)


if __name__ == "__main__":
    main()
