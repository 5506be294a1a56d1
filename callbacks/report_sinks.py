"""Where numbers and reports go: loggers of any kind, and whatever progress bar the Trainer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.progress import BarColumn
from rich.table import Column

from lightning_compress.analysis.history import History
from lightning_compress.analysis.latency import latency_values
from lightning_compress.analysis.legend import legend_of_bytes, legend_of_phases
from lightning_compress.analysis.model_card import write_model_card
from lightning_compress.analysis.report import (
    Report,
    Target,
    describe_missed,
    headers,
    summary_rows,
    summary_values,
    write_json,
)
from lightning_compress.analysis.show import write_html
from lightning_compress.tracking import log_files, log_histograms

from .outputs import written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDE = 120  # columns of a terminal in which a bar has room for names and the user's metrics

__all__ = ["say", "send", "send_targets", "show_in_progress_bar", "write_report"]


def write_report(report: Report, pictures: Mapping[str, Figure], folder: Path) -> Path | None:
    """Write report.json, MODEL_CARD.md and report.html; the page's path, None where it could not be written."""
    numbers = folder / "report.json"
    page = folder / "report.html"
    card = folder / "MODEL_CARD.md"
    written(numbers, lambda: write_json(report, numbers))
    written(card, lambda: write_model_card(report, card))
    return page if written(page, lambda: write_html(report, pictures, page)) else None


def send(logger: Any, report: Report, history: History, pictures: Mapping[str, Figure], step: int) -> None:
    """Give a logger the report; a part of it that the logger refuses costs a warning, and no other part.

    Args:
        logger: Any of Lightning's.
        report: The report.
        history: What happened over the run.
        pictures: Of it, by name.
        step: The optimizer step.
    """
    final = {f"compress/final_{k}": v for k, v in (report["compressed"] or {}).items() if v is not None}
    final |= _of_file(report)
    if isinstance(logger, TensorBoardLogger) and "compress/final_metric" in final:
        final["hp_metric"] = final["compress/final_metric"]  # of its table of hyper-parameters; else -1
    parts: dict[str, Callable[[], object]] = {"numbers": lambda: logger.log_metrics(final, step=step)}
    for name, figure in pictures.items():
        parts[f"picture {name!r}"] = partial(_send_picture, logger, name, figure, step)
    for name, (columns, rows) in _tables(report, history).items():
        parts[f"table {name!r}"] = partial(_send_table, logger, name, columns, rows)
    if isinstance(logger, TensorBoardLogger):
        names = headers(report)
        lines = ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *summary_rows(report))]
        lines += ["", *(f"- {name}: {words}" for name, words in legend_of_bytes(report))]
        parts["table as text"] = lambda: logger.experiment.add_text("compress/report", "\n".join(lines), step)
    phases = legend_of_phases(report)
    if phases:
        parts["phases"] = partial(_send_text, logger, "phases", phases, step)
    if isinstance(logger, WandbLogger):
        bins = {"before": history.before, "after": history.after}
        parts["histograms"] = lambda: log_histograms(logger.experiment, history.bins, bins)
        parts["files"] = lambda: log_files(logger.experiment, report["artifacts"], report["packed"])
    for part, give in parts.items():
        _give(logger, f"the report's {part}", give)


def _keep_on_one_line(columns: Sequence[Any]) -> None:
    """Let the bar alone among a progress bar's columns give way."""
    for column in columns:
        if not isinstance(column, BarColumn):
            column.get_table_column = _unwrapped


def _unwrapped() -> Column:
    return Column(no_wrap=True, overflow="ellipsis")


def _short(items: Mapping[str, str]) -> dict[str, str]:
    """The same in a few characters."""
    rest = {name: text for name, text in items.items() if name != "phase"}
    return {items["phase"]: " ".join(f"{text}b" if name == "bits" else text for name, text in rest.items())}


def _give(logger: Any, what: str, give: Callable[[], object]) -> None:
    try:
        give()
    except Exception as error:  # whatever a logger raises
        rank_zero_warn(f"{type(logger).__name__} did not take {what}: {type(error).__name__}: {error}")


def _of_file(report: Report) -> dict[str, float]:
    """What the first exported file is worth."""
    if not report["artifacts"]:
        return {}
    first = report["artifacts"][0]
    found = {f"compress/file_{key}": first.get(key) for key in ("metric", "bytes", "bytes_zstd", "agreement")}
    found |= {f"compress/file_ms_batch{size}": ms for size, ms in first["latency_ms"].items()}
    return {key: value for key, value in found.items() if value is not None}


def _send_picture(logger: Any, name: str, figure: Figure, step: int) -> None:
    key = f"compress/{name}"
    if hasattr(logger, "log_image"):
        # a key of W&B is a curve or a picture, and compress/sparsity is a curve
        logger.log_image(f"{key}_by_layer" if name == "sparsity" else key, [_pixels(figure)])
    elif hasattr(logger.experiment, "add_figure"):
        logger.experiment.add_figure(key, figure, global_step=step)
    elif hasattr(logger.experiment, "log_figure"):
        logger.experiment.log_figure(logger.run_id, figure, f"{key}.png")


def _send_table(logger: Any, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    if hasattr(logger, "log_table"):
        logger.log_table(f"compress/{name}", columns=columns, data=rows)
    elif hasattr(logger.experiment, "log_table"):
        data = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
        logger.experiment.log_table(logger.run_id, data, f"compress/{name}.json")


def send_targets(logger: Any, targets: Sequence[Target], step: int) -> None:
    """Tell a logger how many targets were missed, and which, where it takes text; a refusal costs a warning."""
    missed = [describe_missed(row) for row in targets if row["missed"]]
    counted = {"compress/targets_missed": float(len(missed))}
    _give(logger, "the number of targets missed", lambda: logger.log_metrics(counted, step=step))
    if missed:
        _give(logger, "the targets", lambda: _send_text(logger, "targets", " ".join(missed), step))


def _send_text(logger: Any, name: str, text: str, step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.experiment.summary[f"compress/{name}"] = text
    elif hasattr(logger.experiment, "add_text"):
        logger.experiment.add_text(f"compress/{name}", text, global_step=step)
    elif hasattr(logger.experiment, "log_text"):
        logger.experiment.log_text(logger.run_id, text, f"compress/{name}.txt")


def _tables(report: Report, history: History) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows by name."""
    tables = {
        "report": (headers(report), summary_values(report)),
        "over_time": (["step", "layer", "sparsity", "weight_bits"], history.rows),
    }
    columns, rows = latency_values(report)
    if rows:
        tables["latency"] = columns, rows
    if report["layers"]:
        tables["layers"] = list(report["layers"][0]), [list(row.values()) for row in report["layers"]]
    return tables


def _pixels(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def say(trainer: pl.Trainer, text: str) -> None:
    """A line above the bar where one is live, else in Lightning's log."""
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", True) and (trainer.training or trainer.validating):
        bar.print(text)
    else:
        rank_zero_info(text)


def show_in_progress_bar(trainer: pl.Trainer, items: Callable[[], dict[str, str]]) -> None:
    """Let the bar show more items: by ``get_metrics``, the method that Lightning has for it.

    Rich's bar stays on one line: its bar shrinks first, and a narrow terminal gets these items alone.
    """
    bar = trainer.progress_bar_callback
    if bar is None:
        return
    original = getattr(bar, "_compress_get_metrics", None) or bar.get_metrics

    def get_metrics(trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, Any]:
        metrics = {k: v for k, v in original(trainer, model).items() if not k.startswith("compress/")}
        progress = getattr(bar, "progress", None)
        if isinstance(bar, RichProgressBar) and progress is not None:
            _keep_on_one_line(progress.columns)
            if progress.console.width < _WIDE:
                return _short(items())
        return items() | metrics

    bar._compress_get_metrics = original  # type: ignore[attr-defined]  # noqa: SLF001  # ours, on a bar that is not
    bar.get_metrics = get_metrics  # type: ignore[method-assign, assignment]
