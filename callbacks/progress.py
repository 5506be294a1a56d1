"""Whatever progress bar the Trainer has: more items in it, and lines that do not break it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["say", "show_in_progress_bar"]


def say(trainer: pl.Trainer, text: str) -> None:
    """A line above the bar where one is live, else in Lightning's log."""
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", True) and trainer.training:
        bar.print(text)
    else:
        rank_zero_info(text)


def show_in_progress_bar(trainer: pl.Trainer, items: Callable[[], dict[str, Any]]) -> None:
    """Let the bar show more items: by ``get_metrics``, the method that Lightning has for it."""
    bar = trainer.progress_bar_callback
    if bar is None:
        return
    original = getattr(bar, "_compress_get_metrics", None) or bar.get_metrics

    def get_metrics(trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, Any]:
        metrics = {k: v for k, v in original(trainer, model).items() if not k.startswith("compress/")}
        return items() | metrics

    bar._compress_get_metrics = original  # type: ignore[attr-defined]  # noqa: SLF001  # ours, on a bar that is not
    bar.get_metrics = get_metrics  # type: ignore[method-assign, assignment]
