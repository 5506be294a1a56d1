"""What the words of a report mean, in a line each; shown where they are."""

from __future__ import annotations

from lightning_compress.analysis.report import Report, short

__all__ = ["legend_of_bytes", "legend_of_models", "legend_of_phases"]


def legend_of_bytes(report: Report) -> list[tuple[str, str]]:
    """The three counts of bytes, each with what it counts."""
    packed = report.get("packed")
    size = f" ({short(packed['bytes'])})" if packed else ""
    return [
        ("bytes", "the file on disk; of a dense model, its float file in the same format"),
        ("zstd", "that file after zstd, as a download is"),
        (f"packed{size}", "what the weights need, each its bits and a zero one bit; compress/bytes estimates it"),
    ]


def legend_of_models(report: Report) -> list[tuple[str, str]]:
    """What the dense rows are, where there are some."""
    found = []
    if report["dense"]:
        found.append(("dense", "the model where compression began, which the rest of the run has not trained"))
    if report["control"]:
        found.append(("dense trained on", "the same run without compression, at its end"))
    return found


def legend_of_phases(report: Report) -> str:
    """What the numbers of ``compress/phase`` stand for; empty where the run has no phases."""
    names = report.get("phases", [])
    return ", ".join(f"{i} {name}" for i, name in enumerate(names)) if len(names) > 1 else ""
