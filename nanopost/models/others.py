"""Whether transformers and peft, where they are installed, read the same model in a folder: its certificate.

What is compared are logits of 32 tokens, of a score model its scores of them, in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopost.models.config import read_json
from nanopost.models.header import read_headers
from nanopost.models.heads import HEAD, load_either
from nanopost.models.peft import load_adapter, origin, read_adapter
from nanopost.models.weights import load_config, words

ROUNDING = 1e-3  # of the largest number: as far as float32 and another order of sums may part
HALF = (
    0.05  # and as far as a merged model may be from base and adapter that was rounded to bfloat16 or float16
)
ANOTHER = "reads another model in"
ASKED = 2**30  # numbers of a model that others are asked to read at the end of a run: 4 GiB once more


def known_ids(folder: str | Path) -> Tensor:
    """Some tokens, (1, 32)."""
    return torch.arange(3, 35)[None] % words(folder, load_config(folder))


def score_count(folder: str | Path) -> int:
    """How many scores a folder's model has; 0: it is a language model."""
    head = read_headers(folder).get(HEAD)
    return head.shape[0] if head and head.shape else 0


@torch.no_grad()
def said(folder: str | Path) -> Tensor:
    """What a folder's model says of them as we read it: logits, or scores, without the rows of padding."""
    scores = score_count(folder)
    count = scores or words(folder, load_config(folder))
    return load_either(folder, scores)(known_ids(folder))[..., :count]


def read_by_others(folder: Path, *, name: str = "it") -> Iterator[str]:
    """What transformers says to a folder, and peft to an adapter in it beside its base: a line each.

    Args:
        folder: of a model; with a folder `adapter` in it if one was merged.
        name: what the lines call it.
    """
    if find_spec("transformers") is None:
        yield "transformers is not installed"
        return
    ours, scores = said(folder), score_count(folder)
    told = heard(ours, known_ids(folder), partial(transformers_model, folder, scores), name, scores=scores)
    yield f"transformers {version('transformers')} {told}"


@torch.no_grad()
def beside(
    adapter: Path, base: str | Path, *, scores: int, four_bits: Collection[str], dtype: torch.dtype
) -> Tensor:
    """What a base says of the same tokens with an adapter beside it.

    Args:
        adapter: its folder; in the folder above is the model that it was merged into, whose tokens these are.
        base: the folder of what it belongs to, which is cast to `dtype`, whole, in memory.
        scores: how many it has; 0: a language model.
        four_bits: the layers of it in NF4.
    """
    model = load_adapter(load_either(base, scores, dtype=dtype, four_bits=four_bits), adapter)
    return model(known_ids(adapter.parent))


def read_beside(adapter: Path) -> Iterator[str]:
    """How far what base and adapter say is from the merged model in the folder above; and what peft says.

    Raises:
        ValueError: ours is further away than rounding.
    """
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        yield f"its base {base} is not here"
        return
    merged, scores = said(adapter.parent), score_count(adapter.parent)
    four_bits = read_adapter(adapter).targets if origin(adapter).get("nf4") == "True" else ()
    ours = beside(adapter, base, scores=scores, four_bits=four_bits, dtype=torch.float32)
    away, most = float((ours[..., : merged.shape[-1]] - merged).abs().max()), float(merged.abs().max())
    half = any(entry.dtype.itemsize == 2 for entry in read_headers(adapter.parent).values())
    if not away <= (HALF if half else ROUNDING) * most:
        raise ValueError(f"{adapter}: beside its base {away:.2g} away from the merged model, of {most:.2g}")
    yield f"beside its base: {away:.2g} away from the merged model"
    if four_bits:
        yield "its base is in four bits, which peft makes otherwise: not compared"
    elif find_spec("transformers") is None or find_spec("peft") is None:
        yield "transformers and peft are not both installed"
    else:
        peft, ids = import_module("peft").PeftModel.from_pretrained, known_ids(adapter.parent)
        told = heard(ours, ids, lambda: peft(transformers_model(base, scores), adapter), "it", scores=scores)
        yield f"peft {version('peft')} {told}"


def certificate_of_run(folder: Path, *, ranks: int) -> list[str]:
    """What others say to the model that a run has written, where they are installed, on one process.

    A large model, and one of several ranks, whose others would wait, is left to the command that it names.
    Products are in float32 here, whatever those of the run were in.
    """
    if find_spec("transformers") is None:
        return []
    size = sum(math.prod(entry.shape) for entry in read_headers(folder).values())
    if size > ASKED or ranks > 1:
        command = f"python -m nanopost.models.weights check {folder} --logits"
        return [f"transformers is not asked at the end of a large run: {command} does"]
    with torch.autocast("cpu", enabled=False):
        lines = list(read_by_others(folder))
        if (adapter := folder / "adapter").is_dir():
            lines += read_beside(adapter)
    return lines


def transformers_model(folder: str | Path, scores: int) -> Any:
    """The folder as transformers reads it; with scores as a score model, a head that is not there made up."""
    library = import_module("transformers")
    library.utils.logging.disable_progress_bar()
    if not scores:
        return library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    auto = library.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32, num_labels=scores)
    model.config.pad_token_id = None  # no id is padding here: it reads the last token
    return model


@torch.no_grad()
def heard(ours: Tensor, ids: Tensor, load: Callable[[], Any], name: str, *, scores: int) -> str:
    """How far their model is from what ours says (a score model at the last token), or why there is none."""
    wanted = ours[:, -1] if scores else ours
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of each other is theirs to mend
            away = float((load()(ids).logits[..., : wanted.shape[-1]] - wanted).abs().max())
    except Exception as error:  # another project may refuse in any way
        return f"refuses {name}: {' '.join(str(error).split())[:200]}"
    verb = "reads" if away <= ROUNDING * float(wanted.abs().max()) else ANOTHER
    return f"{verb} {name}: {away:.2g} away, of {wanted.abs().max():.2g}"
