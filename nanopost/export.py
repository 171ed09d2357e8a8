"""The end of a run: its model as a folder that loads everywhere, and its page."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nanopost import atomic, distributed
from nanopost.data.chat import Chat, copy_chat
from nanopost.models.heads import ActorCritic, ScoreModel
from nanopost.models.llama import Llama
from nanopost.models.others import certificate_of_run
from nanopost.models.trainable import save_policy, save_scores
from nanopost.report import offer_report


def write_policy(
    run: Path, model: Llama, weights: dict[str, Tensor], *, base: Path, stop_ids: tuple[int, ...]
) -> None:
    """Write run/model in one move, read it again, and say where it and the run's report are.

    Args:
        run: the run folder. All ranks may call, rank 0 writes.
        model: as trained.
        weights: its own, whole (`checkpoint.full_state` gathers them from all ranks).
        base: the folder that it started from: chat template and tokenizer are copied from there.
        stop_ids: the tokens that end an answer.
    """
    if distributed.is_main():
        with atomic.atomic_folder(run / "model") as folder:
            copy_chat(base, folder)
            told = save_policy(model, weights, folder, base=base, stop_ids=stop_ids)
        distributed.main_print(f"model: {run / 'model'}{told}\nreport: {offer_report(run)}")
        tell_others(run / "model")


def write_scores(
    place: Path,
    model: ScoreModel | ActorCritic,
    weights: dict[str, Tensor],
    *,
    base: str | Path | None,
    chat: Chat,
    labels: Sequence[str],
) -> None:
    """Write a reward model or a critic in one move, read it again, and say where it is.

    Args:
        place: the folder, run/model or run/critic. All ranks may call, rank 0 writes.
        model: as trained.
        weights: its own, whole, as of a score model.
        base: the folder that it started from; no folder: that of the chat.
        chat: whose template and tokenizer it reads.
        labels: what each score is.
    """
    if distributed.is_main():
        with atomic.atomic_folder(place) as folder:
            copy_chat(chat.folder, folder)
            start = base if isinstance(base, Path) else chat.folder
            told = save_scores(model, weights, folder, base=start, stop_ids=chat.stop_ids, labels=labels)
        distributed.main_print(f"{place.name}: {place}{told}")
        tell_others(place)


def tell_others(folder: Path) -> None:
    """Behind our own certificate those of transformers and peft, where they are installed.

    The model is written: what goes wrong here is told, and ends nothing.
    """
    try:
        lines = certificate_of_run(folder, ranks=distributed.world_size())
    except (OSError, RuntimeError, ValueError) as error:
        lines = [f"not compared with transformers: {error}"]
    for line in lines:
        distributed.main_print(f"  {folder.name}: {line}")
