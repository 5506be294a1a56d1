"""The report in every logger: the same numbers to all, and what pictures, tables and files each takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_compress.analysis.history import History
from lightning_compress.analysis.report import headers, summary_rows
from lightning_compress.tracking import log_files, log_histograms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["send"]


# one branch per kind of logger
def send(logger: Any, report: dict[str, Any], history: History, pictures: Mapping[str, Figure], step: int) -> None:  # noqa: C901
    """Give a logger the report; one that refuses a part of it costs a warning, not the run.

    Args:
        logger: Any of Lightning's.
        report: The report.
        history: What happened over the run.
        pictures: Of it, by name.
        step: The optimizer step.
    """
    final = {f"compress/final_{k}": v for k, v in (report["compressed"] or {}).items() if v is not None}
    try:
        logger.log_metrics(final, step=step)
        if hasattr(logger, "log_image"):
            for name, figure in pictures.items():
                logger.log_image(f"compress/{name}", [_pixels(figure)])
        elif hasattr(logger.experiment, "add_figure"):
            for name, figure in pictures.items():
                logger.experiment.add_figure(f"compress/{name}", figure, global_step=step)
        elif hasattr(logger.experiment, "log_figure"):
            for name, figure in pictures.items():
                logger.experiment.log_figure(logger.run_id, figure, f"compress/{name}.png")
        for name, (columns, rows) in _tables(report, history).items():
            if hasattr(logger, "log_table"):
                logger.log_table(f"compress/{name}", columns=columns, data=rows)
            elif hasattr(logger.experiment, "log_table"):
                data = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
                logger.experiment.log_table(logger.run_id, data, f"compress/{name}.json")
        if isinstance(logger, WandbLogger):
            log_histograms(logger.experiment, history.bins, {"before": history.before, "after": history.after})
            log_files(logger.experiment, report["artifacts"], report["packed"])
    except Exception as error:  # whatever a logger raises
        rank_zero_warn(f"{type(logger).__name__} did not take the report: {type(error).__name__}: {error}")


def _tables(report: dict[str, Any], history: History) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows by name."""
    tables = {
        "report": (headers(report), summary_rows(report)),
        "over_time": (["step", "layer", "sparsity", "weight_bits"], history.rows),
    }
    if report["layers"]:
        tables["layers"] = list(report["layers"][0]), [list(row.values()) for row in report["layers"]]
    return tables


def _pixels(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
