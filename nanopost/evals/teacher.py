"""What distillation asks before the first step: is the teacher comparable, who is it, what does it write?"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nanopost.data.chat import (
    Chat,
    decode,
    load_chat,
    prompt_ids,
    prompt_messages,
    record_samples,
    turn_tokens,
)
from nanopost.data.schema import Message, Record
from nanopost.losses import top_k_forward_kl
from nanopost.losses.checks import wide
from nanopost.models.weights import weights_id
from nanopost.rollout.types import Rollout


def check_tokenizers(student: Chat, teacher: Chat) -> None:
    """Refuse a pair whose distributions cannot be compared: an id must be the same token to both.

    And the student must stop wherever the teacher does. Pulled to a stop token that is none of its own it
    would learn to say it and go on. The other way round is no harm: what only the student ends with becomes
    as rare as the teacher finds it.

    Args:
        student, teacher: of model folders in hub format. How their vocabularies are padded does not matter.
    Raises: ValueError with the first token whose ids differ and how many do, or the teacher's stop tokens at
        which the student does not stop, and the cure.
    """
    cure = "use --mode text, or retrain the student with the teacher's tokenizer"
    both = f"model {student.folder} and teacher {teacher.folder}"
    own, other = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if apart := sorted(token for token in {**own, **other} if own.get(token) != other.get(token)):
        first = f"first {apart[0]!r}, id {own.get(apart[0])} and {other.get(apart[0])}"
        raise ValueError(f"the tokenizers of {both} differ in {len(apart)} tokens ({first}): {cure}")
    if strange := sorted(set(teacher.stop_ids) - set(student.stop_ids)):
        named = ", ".join(f"{i} ({teacher.tokenizer.id_to_token(i)!r})" for i in strange)
        cure = "add them to eos_token_id in the student's generation_config.json, or use --mode text"
        raise ValueError(f"{both}: the teacher stops at {named}, the student does not: {cure}")


def name_teachers(
    folder: str | Path | None, records: Sequence[Record], decoding: dict[str, Any]
) -> list[dict[str, Any]]:
    """Whose text or logits a student learns from, as a run folder keeps it.

    Args:
        folder: the teacher's; its weights are named by their content. None: the records' own text is another
            model's, and each record must say so under `teacher` (a text) and `decoding` (an object).
        records: read for what they name if there is no folder.
        decoding: how the teacher's text is drawn; empty if it writes none.
    Returns: each (teacher, template, decoding) once, in order.
    Raises: ValueError `file:line: ...` for a record that does not name its teacher or the decoding.
    """
    if folder is not None:
        named = {"teacher": f"{folder}@{weights_id(folder)}", "template": load_chat(folder).version}
        return [named | ({"decoding": decoding} if decoding else {})]
    found: list[dict[str, Any]] = []
    for record in records:
        for key, kind in (("teacher", str), ("decoding", dict)):
            value = record.meta.get(key)
            if not isinstance(value, kind) or not value:
                problem = f"without --teacher {key!r} must say whose text this is and how it was drawn"
                raise ValueError(f"{record.file}:{record.line}: {problem}, got {value!r}")
        line = {key: record.meta.get(key) for key in ("teacher", "template", "decoding")}
        if line not in found:
            found.append(line)
    return found


def fitting_prompts(chat: Chat, records: Sequence[Record], room: int) -> list[list[int]]:
    """The tokens of every record's prompt.

    Args:
        chat: of the model that is to answer.
        records: a last assistant turn is what is answered anew.
        room: tokens a prompt may have.
    Returns: one list a record.
    Raises: ValueError `file:line: ...` for a prompt that cannot be rendered or is too long.
    """
    prompts = []
    for record in records:
        messages = prompt_messages(record)
        try:
            prompts.append(prompt_ids(chat, messages))
            if len(prompts[-1]) > room:
                length = len(prompts[-1])
                raise ValueError(f"the prompt has {length} tokens, {room} leave room for max_new_tokens")
        except ValueError as error:
            raise ValueError(f"{record.file}:{record.line}: {error}") from error
    return prompts


def text_lines(
    chat: Chat, student: Chat, records: Sequence[Record], rollouts: Sequence[Rollout], named: dict[str, Any]
) -> list[dict[str, Any] | str]:
    """A teacher's completions as prompt+completion records that `read_jsonl` reads back.

    Args:
        chat: the teacher's.
        student: the chat of the model that is to learn the texts.
        records: where the prompts are from; their answers and other keys are kept.
        rollouts: what the teacher wrote, equally many for every record, those of one adjacent.
        named: teacher, template and decoding; they go to the records' `meta`.
    Returns: one JSON object a rollout, or the reason, with file and line of the prompt, why it is not to be
        learnt: it was cut before its stop token (an end that the teacher did not set), it is blank, the
        teacher has said a token of its turns inside it, or `record_samples` refuses it in the student's
        template and tokens. A text that only quotes such a token is learnt, as text.
    """
    lines: list[dict[str, Any] | str] = []
    of_turns = turn_tokens(chat)
    for i, rollout in enumerate(rollouts):
        record = records[i * len(records) // len(rollouts)]
        messages = prompt_messages(record)
        prompt = [{k: v for k, v in vars(m).items() if v or k == "content"} for m in messages]
        text, answer = decode(chat, rollout.completion_ids), {"answer": record.answer}
        line = {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}
        line |= ({} if record.answer is None else answer) | record.meta | named
        lines.append(line)
        try:
            if rollout.finish_reason != "stop" or not text.strip():
                why = "the text is blank" if rollout.finish_reason == "stop" else "cut at max_new_tokens"
                raise ValueError(f"{record.file}:{record.line}: {why}")
            said = map(chat.tokenizer.id_to_token, rollout.completion_ids[:-1])
            if control := [token for token in said if token in of_turns]:
                raise ValueError(
                    f"{record.file}:{record.line}: the text has the control token {control[0]!r}"
                )
            answered = (*messages, Message("assistant", text))
            record_samples(student, replace(record, messages=answered, context=len(messages)))
        except ValueError as error:
            lines[-1] = str(error)
    return lines


def top_k_kl(student_logits: Tensor, teacher_logits: Tensor, *, k: int, temperature: float) -> Tensor:
    """Forward KL to a teacher of whom only the k likeliest tokens are known; the rest is one bucket.

    Args:
        student_logits: (..., V); carries the gradient.
        teacher_logits: (..., V); detached.
        k: tokens of the teacher that are looked at; V or more is the whole forward KL.
        temperature: τ of both.
    Returns: (...), nats × τ²; see `losses.top_k_forward_kl`.
    """
    teacher_logps = (wide(teacher_logits.detach()) / temperature).log_softmax(-1)
    logps, ids = teacher_logps.topk(min(k, teacher_logps.shape[-1]))
    return top_k_forward_kl(student_logits, logps, ids, temperature=temperature)
