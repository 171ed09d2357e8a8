"""Preference samples: the token ids of labelled records, with the completion's assistant turns as the mask.

They are what SFT would train on: each turn's tokens as the sampler would emit them, its stop token included.
The prompt is never in the mask, and neither are the user's and the tools' turns of a longer completion.
"""

from nanopost.data.chat import Chat, decode, record_samples
from nanopost.data.schema import Message, Preference, Record, Sample, Steps

SEPARATOR = "\n"  # between two steps of one answer


def completion_sample(
    chat: Chat, prompt: tuple[Message, ...], completion: tuple[Message, ...], *, file: str, line: int
) -> Sample:
    """Prompt and completion as one sequence, the mask on every assistant turn of the completion.

    Args:
        chat: template, tokenizer and stop ids.
        prompt: given, never trained on, whatever assistant turns it has.
        completion: at least one message; the last one is an assistant turn.
        file, line: where the record stands; they open the error.
    Returns: a Sample that ends in the last turn's stop token.
    Raises: ValueError `file:line: ...` as `record_samples`, and where the template writes earlier turns anew
        (as those do that drop old reasoning): no one sequence is then what the sampler saw at every turn.
    """
    messages = prompt + completion
    if not completion or completion[-1].role != "assistant":
        raise ValueError(f"{file}:{line}: the completion must end with an assistant turn")
    samples = record_samples(chat, Record(messages, None, None, {}, file, line, context=len(prompt)))
    whole = samples[0]
    for turn in samples[1:]:
        seen = sum(i in chat.stop_ids for i in whole.ids)
        stops = [n for n, i in enumerate(turn.ids, start=1) if i in chat.stop_ids]
        if len(stops) <= seen or decode(chat, turn.ids[: stops[seen - 1]]) != decode(chat, whole.ids):
            problem = "the chat template writes earlier turns anew: one sequence cannot hold them all"
            raise ValueError(f"{file}:{line}: {problem}; keep only the last turn of each completion")
        # What is behind those turns; they themselves keep the tokens in which they were emitted.
        tail = slice(stops[seen - 1], None)
        whole = Sample(whole.ids + turn.ids[tail], whole.mask + turn.mask[tail], whole.place)
    return whole


def preference_samples(chat: Chat, record: Preference) -> tuple[Sample, Sample]:
    """The samples of a pair, chosen and rejected; both start with the very same tokens of the prompt."""
    chosen, rejected = (
        completion_sample(chat, record.prompt, side, file=record.file, line=record.line)
        for side in (record.chosen, record.rejected)
    )
    return chosen, rejected


def steps_sample(chat: Chat, record: Steps) -> tuple[Sample, tuple[int, ...]]:
    """One answer of all steps, a line break between two, and where each step ends.

    Args:
        chat: template, tokenizer and stop ids.
        record: its steps are the lines of one assistant turn.
    Returns: the Sample, and for each step the index in `ids` of its last token: the token at which the text
        up to the step's last character is complete. The stop token belongs to no step.
    Raises: ValueError `file:line: ...` where the template changes the text of the steps, or where one token
        holds the end of a step and the beginning of the next.
    """
    place, text = f"{record.file}:{record.line}", SEPARATOR.join(record.steps)
    turn = (Message("assistant", text),)
    sample = completion_sample(chat, record.prompt, turn, file=record.file, line=record.line)
    prompt = sample.mask.index(True)
    answer = sample.ids[prompt:]
    whole, bare = decode(chat, answer), text.strip()  # a template may trim both ends, and write before it
    if not whole.rstrip().endswith(bare):
        raise ValueError(f"{place}: the chat template changes the text of the steps")
    at, ends, done = whole.rindex(bare) - text.index(bare), list[int](), 0
    for i, step in enumerate(record.steps):
        first, last = at + len(step) - len(step.lstrip()), at + len(step.rstrip())  # of its characters
        if done and len(decode(chat, answer[:done])) > first:
            raise ValueError(f"{place}: one token holds the end of completions[{i - 1}] and the next's start")
        prefixes = range(done + 1, len(answer) + 1)
        done = next(n for n in prefixes if decode(chat, answer[:n])[:last] == whole[:last])
        ends.append(prompt + done - 1)
        at += len(step) + len(SEPARATOR)
    return sample, tuple(ends)
