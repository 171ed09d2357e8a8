"""Small real chats for tests: a byte-level tokenizer with a few merges and templates of three shapes."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from nanopost.data.chat import Chat, load_chat, write_chat

# <|im_start|>role\ncontent<|im_end|>\n, no BOS
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{ '<call>' + call | tojson + '</call>' }}
{%- endfor %}
{{ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# BOS, then <|start|>role<|head|>\n\ncontent<|eot|>; a turn that calls a tool ends in <|eom|>
HEADER = """{{ bos_token }}
{%- for message in messages %}
{{- '<|start|>' + message.role + '<|head|>\\n\\n' + message.content | trim }}
{%- if message.tool_calls %}
{{- message.tool_calls | tojson + '<|eom|>' }}
{%- else %}
{{- '<|eot|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|head|>\\n\\n' }}{% endif %}"""

# ChatML that shows the reasoning of the last turn only
THINK = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and not loop.last and '</think>' in message.content %}
{{- message.content.split('</think>')[-1].lstrip('\\n') }}
{%- else %}
{{- message.content }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {"chatml": CHATML, "header": HEADER, "think": THINK}
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ċ", "Ċ"), ("Ċ", "1"), ("1", "2"), ("Ġ", "a")]


def byte_tokenizer(special: list[str], *, prefix_space: bool = False) -> Tokenizer:
    """Byte-level BPE that does not split texts into words: a merge may cross any boundary of a template.

    Ids: printable ASCII c has ord(c) − 33, the newline 198, the space 220; the merges follow from 256 on in
    their order, then the special tokens.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def make_chat(folder: Path, kind: str = "chatml") -> Chat:
    """A chat of a shape: "chatml"; "header", with BOS and two stop tokens; "think" drops old reasoning."""
    if kind != "header":
        return write_chat(
            folder, byte_tokenizer(["<|im_start|>", "<|im_end|>"]), TEMPLATES[kind], eos_token="<|im_end|>"
        )
    tokenizer = byte_tokenizer(["<|bos|>", "<|start|>", "<|head|>", "<|eot|>", "<|eom|>"])
    # Like the hub's tokenizers of this shape, it puts a BOS of its own before a text unless told not to.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    write_chat(folder, tokenizer, HEADER, bos_token="<|bos|>", eos_token="<|eot|>")
    stops = [tokenizer.token_to_id(token) for token in ("<|eot|>", "<|eom|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return load_chat(folder)
