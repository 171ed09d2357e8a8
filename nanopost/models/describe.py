"""What a model folder is, in a few lines, and whether others read the same model in it.

python -m nanopost.models.weights check DIR [--values] [--logits]
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open

from nanopost.models.config import FAMILIES, LlamaConfig, load_config, read_json
from nanopost.models.header import check_entries, read_headers, shard_files
from nanopost.models.heads import ScoreModel, load_either, save_score_model
from nanopost.models.llama import Llama
from nanopost.models.others import ANOTHER, known_ids, read_beside, read_by_others, score_count
from nanopost.models.peft import check_factors, origin
from nanopost.models.weights import TIED, save_model, words


def describe(folder: str | Path) -> Iterator[str]:
    """The lines of a checked folder; no number of a weight is read.

    Raises:
        ValueError: what `load_config`, `read_headers`, `check_entries` and `words` refuse.
    """
    folder = Path(folder)
    c, entries, scores = load_config(folder), read_headers(folder), score_count(folder)
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
    if (adapter := folder / "adapter").is_dir():
        yield f"adapter     {adapter_line(adapter, model)}"
    yield f"read by     what reads a {FAMILIES[c.model_type]}For{kind}; --logits asks transformers"


def adapter_line(folder: Path, model: Llama | ScoreModel) -> str:
    """Rank, scale, layers and base of the adapter that was merged into a model; its tensors fit that."""
    adapter = check_factors(folder, model)
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    beside = f"beside {base}" + (" in four bits" if origin(folder).get("nf4") == "True" else "")
    return f"rank {adapter.rank}, α {adapter.alpha:g}, {', '.join(adapter.targets)}; {beside}"


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
def certificate(folder: Path, work: Path) -> Iterator[str]:
    """How far what a folder's model says is from what others read, in float32: logits, or scores.

    Args:
        folder: to be read.
        work: an empty folder: the model is written there and read again.

    Raises:
        ValueError: written and read again, or as base and adapter, it is another model.
    """
    scores = score_count(folder)
    model, what = load_either(folder, scores), "scores" if scores else "logits"
    if scores:
        labels = [str(number) for number in range(scores)]
        save_score_model(model.config, model.state_dict(), work, stop_ids=(0,), labels=labels)
    else:
        save_model(model.config, model.state_dict(), work, stop_ids=(0,))
    ids, count = known_ids(folder), scores or words(folder, model.config)
    again, ours = (read(ids)[..., :count] for read in (load_either(work, scores), model))
    away = float((again - ours).abs().max())
    if away:
        raise ValueError(f"{folder}: written and read again, its {what} are {away:.2g} away")
    yield f"{what}      written and read again: 0 away"
    if (adapter := folder / "adapter").is_dir():
        yield from (f"adapter     {line}" for line in read_beside(adapter))
    yield from (f"{what}      {line}" for line in read_by_others(folder))
    if find_spec("transformers"):
        yield from (f"{what}      {line}" for line in read_by_others(work, name="what was written"))


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
                for line in (lines := list(certificate(given.folder, Path(work)))):
                    print(line)
                if wrong := [line for line in lines if ANOTHER in line]:
                    raise ValueError(f"{given.folder}: {' '.join(wrong[0].split())}")
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
