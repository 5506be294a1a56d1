"""Where the files of a run stand, and what becomes of the run where they cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compress.checks import first_line
from lightning_compress.files import check_folder, free_folder

from .run import on_rank_zero

__all__ = ["new_folder", "output_folder", "written"]


def output_folder(trainer: pl.Trainer, name: str, dirpath: str | Path | None, below: str = "") -> Path:
    """The folder of a callback's files, tried before training; all processes ask together.

    Args:
        trainer: The Trainer of the run.
        name: The argument as a user writes it, such as ``"Export.dirpath"``.
        dirpath: What was given. None stands for the folder that the first logger has for this run, else for the
            Trainer's default_root_dir.
        below: Folder below what None stands for.

    Raises:
        ValueError: If the folder cannot be written to.
    """
    folder = Path(dirpath) if dirpath is not None else _folder_of_run(trainer) / below
    on_rank_zero(trainer, lambda: check_folder(name, folder, dirpath))
    return folder


def _folder_of_run(trainer: pl.Trainer) -> Path:
    # Of other loggers trainer.log_dir is a folder of all their runs, such as mlruns, in which nobody else may write.
    has_own = trainer.loggers and hasattr(trainer.loggers[0], "log_dir")
    return Path((trainer.log_dir if has_own else None) or trainer.default_root_dir)


def new_folder(callback: pl.Callback, folder: Path, names: Iterable[str], known: str | None = None) -> Path:
    """The folder, or one below it where an earlier run has left files of these names; says so.

    Args:
        callback: Who writes.
        folder: Where.
        names: Names of the files.
        known: The folder that the run had before it was interrupted: it goes on in that one.
    """
    if known is not None and folder in (Path(known), Path(known).parent):
        return Path(known)
    free = free_folder(folder, names)
    if free != folder:
        rank_zero_info(f"{type(callback).__name__} writes to {free}: in {folder} stand the files of an earlier run.")
    return free


def written(path: Path, write: Callable[[], object]) -> bool:
    """Whether a file could be written after training: a full disk costs a warning, and not the run.

    Args:
        path: The file.
        write: Writes it.
    """
    try:
        write()
    except OSError as error:
        rank_zero_warn(
            f"{path} could not be written: {first_line(error)}. The trained model and its checkpoints are safe."
        )
        return False
    return True
