"""The end of a run: its model as a folder that loads everywhere, and its page."""

from pathlib import Path

from torch import Tensor

from nanopost import atomic, distributed
from nanopost.data.chat import copy_chat
from nanopost.models.llama import Llama
from nanopost.models.trainable import save_policy
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
