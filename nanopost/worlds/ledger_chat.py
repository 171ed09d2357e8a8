"""The ledger world's tokenizer and chat template: one plain shape for base text, demonstrations and prompts.

    User: total of the Q3 spend of sales 482 and marketing 365.
    Assistant: <think>2+5:07 8+6:14 4+3:08</think>{"total": 847}<|end|>

Digits are always single tokens. A role's opening is a piece of its own, so that a prompt's tokens are a
prefix of the tokens of prompt and answer together; the tags of scratchpad and tool call are one token
each.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanopost.data.chat import write_chat
from nanopost.data.schema import read_jsonl

END = "<|end|>"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# Role openings; words with the space before; digits; JSON's signs up to a quote; other signs; spaces.
PIECES = (
    r"\n?[A-Z][a-z]+: | ?[A-Za-z]+|[0-9]"
    r'|[^A-Za-z0-9\n()]*"(?:[:,}\]] ?-?)*| ?[^\sA-Za-z0-9"]+|\s+'
)
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- message.role | capitalize + ': ' + message.content -}}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{- '<tool_call>' + call.function | tojson + '</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|end|>\n' if message.role == 'assistant' else '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 640) -> Tokenizer:
    """Byte-level BPE over the corpus; every text decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tags = [AddedToken(tag, normalized=False) for tag in TAGS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(tags)
    return tokenizer


def write_base_folder(folder: str | Path, corpora: str | Path, *, vocab_size: int = 640) -> None:
    """Train the tokenizer on the base text and demonstrations in `corpora`; write it with the template."""
    records = [record for name in ("base", "sft") for record in read_jsonl(Path(corpora, f"{name}.jsonl"))]
    texts = [
        record.text or "\n".join(f"{m.role.capitalize()}: {m.content}" for m in record.messages)
        for record in records
    ]
    tags = re.compile("|".join(TAGS))
    tokenizer = train_tokenizer((part for text in texts for part in tags.split(text)), vocab_size=vocab_size)
    write_chat(folder, tokenizer, TEMPLATE, eos_token=END)
