"""What a model folder is, in a few lines, and whether others read the same model in it.

python -m nanopost.models.weights check DIR [--values] [--logits]
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nanopost.models.config import FAMILIES, LlamaConfig, load_config, read_json
from nanopost.models.header import check_entries, read_headers, shard_files
from nanopost.models.heads import HEAD, ScoreModel, load_either, save_score_model
from nanopost.models.llama import Llama
from nanopost.models.peft import load_adapter, origin, read_adapter
from nanopost.models.weights import TIED, save_model, words


def describe(folder: str | Path) -> Iterator[str]:
    """The lines of a checked folder; no number of a weight is read.

    Raises:
        ValueError: what `load_config`, `read_headers`, `check_entries` and `words` refuse.
    """
    folder = Path(folder)
    c, entries = load_config(folder), read_headers(folder)
    scores = entries[HEAD].shape[0] if HEAD in entries and entries[HEAD].shape else 0
    with torch.device("meta"):
        model = ScoreModel(c, scores) if scores else Llama(c)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if c.tie_word_embeddings and TIED not in entries:
        wanted.pop(TIED, None)
    check_entries(entries, wanted, folder)
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in entries.values())
    files, numbers = shard_files(folder), sum(math.prod(entry.shape) for entry in entries.values())
    size = sum(path.stat().st_size for path in files)
    head = f", {scores} scores" if scores else ", head tied to the embedding" if c.tie_word_embeddings else ""
    kind = "SequenceClassification" if scores else "CausalLM"
    told = ", ".join(f"{count} in {dtype}" for dtype, count in dtypes.most_common())
    yield f"family      {c.model_type}, {FAMILIES[c.model_type]}For{kind}"
    yield f"shape       {shape(c)}"
    yield f"positions   {positions(c)}"
    yield f"parameters  {numbers:,}{head}"
    yield f"tensors     {told}; {size / 1e6:,.1f} MB in {len(files)} file{'s' * (len(files) > 1)}"
    yield f"vocabulary  {vocabulary(folder, c)}"
    yield f"stop ids    {stop_ids(folder, c)}"
    yield f"template    {template(folder)}"
    yield f"read by     what reads a {FAMILIES[c.model_type]}For{kind}; --logits asks transformers"


def shape(c: LlamaConfig) -> str:
    """Width, layers, heads."""
    heads = f"{c.num_attention_heads} heads over {c.num_key_value_heads} of {c.head_dim}"
    return f"width {c.hidden_size}, {c.num_hidden_layers} layers, {heads}, SwiGLU {c.intermediate_size}"


def positions(c: LlamaConfig) -> str:
    """How many, and how they turn the heads."""
    window = f", a window of {c.sliding_window}" if c.sliding_window else ""
    scaling, length = c.rope_scaling, c.max_position_embeddings
    stretched = "" if scaling is None else f", {scaling.rope_type} × {scaling.factor:g}"
    return f"{length:,}, θ = {c.rope_theta:g}{stretched}{window}"


def vocabulary(folder: Path, c: LlamaConfig) -> str:
    """Tokens and rows."""
    if not (folder / "tokenizer.json").is_file():
        return f"{c.vocab_size:,} rows, no tokenizer.json"
    count = words(folder, c)
    return f"{count:,} tokens, {c.vocab_size - count:,} rows of padding (never sampled)"


def stop_ids(folder: Path, c: LlamaConfig) -> str:
    """The ids that end a turn, and the file that names them.

    Raises:
        ValueError: an id that is no token.
    """
    names = ("generation_config.json", "config.json")
    for path in (folder / name for name in names if (folder / name).is_file()):
        found = read_json(path).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if strange := [x for x in ids if type(x) is not int or not 0 <= x < words(folder, c)]:
                raise ValueError(f"{path}: eos_token_id {strange[0]!r} is no token")
            return f"{', '.join(map(str, ids))} ({path.name})"
    path = folder / "tokenizer_config.json"
    eos = read_json(path).get("eos_token") if path.is_file() else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return f"{eos!r} ({path.name})" if eos else "none: nothing could be sampled from this folder"


def template(folder: Path) -> str:
    """SHA-256 of the chat template, and whether it stands in both of its places."""
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    texts = {path.name: path.read_bytes().decode()} if path.is_file() else {}
    text = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(text, list):
        text = {entry["name"]: entry["template"] for entry in text}.get("default")
    if text is not None:
        texts[config.name] = text
    if len(set(texts.values())) > 1:
        raise ValueError(f"{folder}: the templates in {' and '.join(texts)} differ")
    hashes = [sha256(text.encode()).hexdigest()[:16] for text in texts.values()]
    return f"sha256 {hashes[0]}… in {' and '.join(texts)}" if texts else "none"


def check_finite(folder: str | Path) -> int:
    """How many numbers of a folder's weights are finite: all of them.

    Raises:
        ValueError: naming the file and the tensor with one that is not.
    """
    count = 0
    for path in shard_files(Path(folder)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(name)
                if bad := int((~tensor.isfinite()).sum()):
                    raise ValueError(f"{path}: {name} has {bad} numbers that are not finite")
                count += tensor.numel()
    return count


@torch.no_grad()
def certificate(folder: str | Path, work: Path) -> Iterator[str]:
    """How far what a folder's model says is from what others read, in float32: logits, or scores.

    Args:
        folder: to be read.
        work: an empty folder: the model is written there and read again.
    """
    head = read_headers(folder).get(HEAD)
    scores = head.shape[0] if head else 0
    model, count = load_either(folder, scores), words(folder, load_config(folder))
    ids, what = torch.arange(3, 35)[None] % count, "scores" if scores else "logits"
    ours = model(ids)[..., : scores or count]
    if scores:
        labels = [str(number) for number in range(scores)]
        save_score_model(model.config, model.state_dict(), work, stop_ids=(0,), labels=labels)
    else:
        save_model(model.config, model.state_dict(), work, stop_ids=(0,))
    again = load_either(work, scores)(ids)[..., : scores or count]
    yield f"{what}      written and read again: {(again - ours).abs().max():.2g} away"
    if (adapter := Path(folder) / "adapter").is_dir():
        yield from adapter_certificate(adapter, ids, ours, scores=scores)
    if find_spec("transformers") is None:
        yield f"{what}      transformers is not installed"
        return
    for which, place in (("it", folder), ("what was written", work)):
        told = heard(which, ours, ids, partial(transformers_model, place, scores), scores=scores)
        yield f"{what}      transformers {version('transformers')} {told}"


def transformers_model(folder: str | Path, scores: int) -> Any:
    """The folder as transformers reads it; with scores as a score model, a head that is not there made up."""
    library = import_module("transformers")
    if not scores:
        return library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    auto = library.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32, num_labels=scores)
    model.config.pad_token_id = None  # no id is padding here: it reads the last token
    return model


def heard(what: str, ours: Tensor, ids: Tensor, load: Callable[[], Any], *, scores: int) -> str:
    """How far their model is from what ours says (a score model at the last token), or why there is none."""
    wanted = ours[:, -1] if scores else ours
    try:
        away = (load()(ids).logits[..., : wanted.shape[-1]] - wanted).abs().max()
    except Exception as error:  # another project may refuse in any way
        return f"refuses {what}: {' '.join(str(error).split())[:200]}"
    return f"reads {what}: {away:.2g} away, of {wanted.abs().max():.2g}"


def adapter_certificate(adapter: Path, ids: Tensor, merged: Tensor, *, scores: int) -> Iterator[str]:
    """How far what the base says with its adapter beside it is from what the merged model says."""
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        yield f"adapter     its base {base} is not here"
        return
    four_bits = read_adapter(adapter).targets if origin(adapter).get("nf4") == "True" else ()
    beside = load_adapter(load_either(base, scores, four_bits=four_bits), adapter)(ids)
    away = (beside[..., : merged.shape[-1]] - merged).abs().max()
    yield f"adapter     beside its base: {away:.2g} away from the merged model"
    if four_bits:
        yield "adapter     its base is in four bits, which peft makes otherwise: not compared"
        return
    if find_spec("transformers") is None or find_spec("peft") is None:
        yield "adapter     transformers and peft are not both installed"
        return
    peft = import_module("peft").PeftModel.from_pretrained
    told = heard("it", merged, ids, lambda: peft(transformers_model(base, scores), adapter), scores=scores)
    yield f"adapter     peft {version('peft')} {told}"


def main(arguments: list[str] | None = None) -> None:
    """Print what a folder is; leave with 1 and one line where something is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="python -m nanopost.models.weights", description=__doc__.split("\n")[0]
    )
    check = parser.add_subparsers(required=True).add_parser(
        "check", help="say what a folder is, or what is wrong with it"
    )
    check.add_argument("folder", type=Path, metavar="DIR")
    check.add_argument(
        "--values", action="store_true", help="read all weights and refuse one that is not finite"
    )
    check.add_argument(
        "--logits", action="store_true", help="compare with what is written and with transformers"
    )
    given = parser.parse_args(arguments)
    try:
        for line in describe(given.folder):
            print(line)
        if given.values:
            print(f"values      {check_finite(given.folder):,} numbers, all finite")
        if given.logits:
            with TemporaryDirectory() as work:
                for line in certificate(given.folder, Path(work)):
                    print(line)
    except ValueError as error:
        raise SystemExit(str(error)) from None
