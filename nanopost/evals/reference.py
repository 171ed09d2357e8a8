"""What a preference run asks a model that does not change: once, before the first step, and never again.

The log-probs of a reference are the same in every epoch, so they are scored once and the reference can go.
They are kept by what the sample is, its tokens and its mask, not by its place in a file: a shuffle, an
evaluation or another order of the data cannot mix them up. A file of them names the weights they are of.
"""

import gc
import hashlib
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanopost.atomic import hidden, named
from nanopost.data.schema import Sample
from nanopost.models.weights import weights_id


@dataclass(frozen=True)
class Example:
    """The completions of one record: chosen and rejected, or a single one that was liked or not."""

    place: str  # file:line of the record
    samples: tuple[Sample, ...]  # each completion behind its prompt
    liked: tuple[bool, ...]  # of each sample: it is the chosen one, or labelled so
    others: tuple[Sample, ...] = ()  # KTO: of each sample its prompt with a completion to another prompt


def sample_id(sample: Sample) -> str:
    """A sample's name by its content: 32 hex digits of a SHA-256 over ids and mask."""
    return hashlib.sha256(array("q", sample.ids).tobytes() + bytes(sample.mask)).hexdigest()[:32]


def write_logps(path: str | Path, logps: Mapping[str, Tensor], *, weights: str) -> None:
    """Write log-probs to a safetensors file, in one move.

    Args:
        path: the file; its folder is made.
        logps: by sample id, one tensor over the supervised tokens of the sample.
        weights: the `weights_id` of the model that gave them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path):
        save_file(dict(logps), temporary := hidden(path), metadata={"weights": weights})
    os.replace(temporary, path)


def read_logps(path: str | Path, *, weights: str) -> dict[str, Tensor]:
    """The log-probs of a file that `write_logps` wrote, by sample id.

    Args:
        path: the file.
        weights: the `weights_id` of the model they must be of.

    Returns:
        One tensor a sample, over its supervised tokens; nothing where there is no file yet.

    Raises:
        ValueError: they are another model's.
    """
    if not Path(path).exists():
        return {}
    with safe_open(path, framework="pt") as file:
        kept = (file.metadata() or {}).get("weights")
        if kept != weights:
            raise ValueError(f"{path}: log-probs under the weights {kept}, this start has {weights}")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def fixed_logps(
    path: str | Path,
    folder: str | Path,
    samples: Sequence[Sample],
    score: Callable[[list[Sample]], Sequence[Tensor]],
    *,
    resume: bool,
    write: bool,
) -> dict[str, Tensor]:
    """The log-probs of all samples under a model that does not change: read where they are kept, else scored.

    Args:
        path: the file that keeps them.
        folder: the model's, in hub format.
        samples: any order, any repetition.
        score: one tensor a sample under that model, in their order; called once, for what is not kept, or
            not at all.
        resume: whether to read the file; a new run scores everything.
        write: whether to write the file when something was scored (on one rank).

    Returns:
        One tensor a sample id, over the sample's supervised tokens.

    Raises:
        ValueError: what is kept is another model's.
    """
    weights = weights_id(folder)
    logps = read_logps(path, weights=weights) if resume else {}
    missing = {key: sample for sample in samples if (key := sample_id(sample)) not in logps}
    if missing:
        logps |= zip(missing, score(list(missing.values())), strict=True)
        gc.collect()  # under FSDP only the collector finds a model that is gone
        if write:
            write_logps(path, logps, weights=weights)
    return logps


def mismatched(examples: Sequence[Example], *, longest: int) -> list[Example]:
    """The examples with their `others`: each prompt before a completion to another prompt, for KTO's z.

    The completion is the one in the same place of the next example (after the last comes the first) whose
    prompt differs and whose completion leaves prompt and completion at most `longest` positions together. So
    it depends on the data alone: no batch, order or epoch changes it, and a batch of one has its own too.

    Args:
        examples: all of a data set.
        longest: positions a sample may take; one of n tokens takes n − 1.

    Returns:
        The examples in their order, each with as many others as samples.

    Raises:
        ValueError: naming the first record that no other completion can follow: every prompt is the same, or
            nothing fits.
    """
    starts = [[sample.mask.index(True) for sample in example.samples] for example in examples]

    def other(i: int, k: int) -> Sample:
        sample, start = examples[i].samples[k], starts[i][k]
        for j in (*range(i + 1, len(examples)), *range(i)):
            place = k % len(starts[j])
            giver, cut = examples[j].samples[place], starts[j][place]
            ids = sample.ids[:start] + giver.ids[cut:]
            if giver.ids[:cut] != sample.ids[:start] and len(ids) <= longest + 1:
                return Sample(ids, sample.mask[:start] + giver.mask[cut:])
        raise ValueError(
            f"{examples[i].place}: no completion to another prompt fits behind this one in {longest} tokens "
            "(is every prompt the same?); kto needs such a mismatched pair of each"
        )

    return [
        replace(example, others=tuple(other(i, k) for k in range(len(example.samples))))
        for i, example in enumerate(examples)
    ]
