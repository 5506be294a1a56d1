"""The report: a table for the terminal, and one HTML file with pictures, of what compression bought."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from lightning_compress.analysis.page import html_table, picture, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["headers", "short", "summary_rows", "terminal_table", "write_html", "write_json"]


def summary_rows(report: dict[str, Any]) -> list[list[str]]:
    """The rows of the table: model, metric, sparsity, parameters, MACs, bytes, zstd, latency at batch 1 and 64."""
    first = report["artifacts"][0] if report["artifacts"] else None
    float_latency = first["latency_ms_float"] if first else {}
    rows = []
    for key, label in (("dense", "dense"), ("control", "dense control"), ("compressed", "compressed")):
        if report.get(key):
            latency = report.get("latency_ms_pytorch", {}) if key == "compressed" else float_latency
            rows.append([label, *_row(report[key], latency)])
    for artifact in report["artifacts"]:
        label = Path(artifact["path"]).name
        values = {
            **(report["compressed"] or {}),
            **{k: artifact[k] for k in ("metric", "bytes", "bytes_zstd")},
        }
        rows.append([label, *_row(values, artifact["latency_ms"])])
    return rows


def _row(values: dict[str, Any], latency: dict[str, float]) -> list[str]:
    def number(key: str, form: str) -> str:
        return "-" if values.get(key) is None else format(values[key], form)

    counts = [short(values.get(key)) for key in ("num_nonzero", "macs", "bytes", "bytes_zstd")]
    times = [f"{latency[size]:.2f}" if size in latency else "-" for size in ("1", "64")]
    return [number("metric", ".4f"), number("sparsity", ".1%"), *counts, *times]


_LETTERS = (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))


def short(value: float | None) -> str:
    """A count in three digits with a thousands letter, such as 77.8k."""
    if value is None:
        return "-"
    shown = ((f"{value / size:.3g}", letter) for letter, size in _LETTERS)
    return "".join(next(pair for pair in shown if float(pair[0]) < 1000 or pair[1] == "T"))


def headers(report: dict[str, Any]) -> list[str]:
    """The table's column names."""
    metric = report["metric"] or "metric"
    return ["model", metric, "sparsity", "params", "MACs", "bytes", "zstd", "ms @1", "ms @64"]


def terminal_table(report: dict[str, Any]) -> Table:
    """The table for a terminal."""
    table = Table(title="what compression bought", box=box.SIMPLE_HEAD, padding=0, header_style="bold")
    for i, name in enumerate(headers(report)):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in summary_rows(report):
        table.add_row(*(f" {cell}" if i else cell for i, cell in enumerate(row)))
    return table


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write report.json; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_CAPTIONS = {
    "metric": "The validation metric over the phases.",
    "sparsity": "Sparsity of each layer over the run.",
    "bits": "Bits of each layer's weights over the run.",
    "weights": "Weights of all counted layers, before compression and at the end.",
}


def write_html(report: dict[str, Any], pictures: Mapping[str, Figure], path: Path) -> None:
    """Write one self-contained report.html."""
    shown = [picture(figure, _CAPTIONS[name]) for name, figure in pictures.items()]
    if not shown:
        shown.append("<p>No pictures: pip install 'lightning-compress[report]'.</p>")
    problems = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in report.get("warnings", []))
    layers = [
        [
            *(row["name"], row["type"], *(short(row[key]) for key in ("num_params", "macs", "bytes"))),
            *(f"{row['sparsity']:.1%}", str(row["weight_bits"]), str(row["input_bits"])),
        ]
        for row in report["layers"]
    ]
    layer_names = [
        "layer",
        "type",
        "params",
        "MACs",
        "bytes, packed",
        "sparsity",
        "weight bits",
        "input bits",
    ]
    proof = [
        [
            *(
                Path(a["path"]).name,
                a["runtime"],
                *(_show(a[k]) for k in ("metric", "agreement", "max_abs_diff", "max_rel_diff")),
            ),
            *(f"{a['integer_kernels']} of {a['num_kernels']}" if a.get("num_kernels") else "-", a.get("batch", "")),
            a.get("cpu", ""),
        ]
        for a in report["artifacts"]
    ]
    body = [
        "<h1>Compression report</h1>",
        f"<p>{html.escape(_headline(report))}</p>",
        _facts(report),
        problems,
        "<h2>What compression bought</h2>",
        html_table(headers(report), summary_rows(report)),
        "<p>Params are those that are not zero. The dense models are one float graph, timed once, interleaved with the "
        "exported file in the same runtime; the compressed model is timed in PyTorch. Medians, one thread. "
        "Bytes are of the exported file.</p>",
        "<h2>Pictures</h2>",
        *shown,
        "<h2>Proof of the files</h2>",
        html_table(
            [
                *("file", "runtime", report["metric"] or "metric", "agreement", "max abs diff", "of range"),
                *("integer kernels", "batch", "run on"),
            ],
            proof,
        ),
        "<h2>Layers</h2>",
        html_table(layer_names, layers),
    ]
    write_page(path, "Compression report", body)


def _headline(report: dict[str, Any]) -> str:
    seconds = report["seconds"]
    return f"Trained for {seconds['fit']:.0f} s, of which {seconds['overhead']:.0f} s for measuring and reporting."


def _facts(report: dict[str, Any]) -> str:
    facts = [(f"{report['compressed']['sparsity']:.1%}", "of the weights are zero")]
    if report["artifacts"]:
        first = report["artifacts"][0]
        dense = report["dense"] or {}
        for key, text in (("bytes", "smaller file"), ("bytes_zstd", "smaller download (zstd)")):
            if dense.get(key):
                facts.append((f"{dense[key] / first[key]:.1f}x", text))
        if report.get("packed") and dense.get("bytes"):
            facts.append((f"{dense['bytes'] / report['packed']['bytes']:.1f}x", "smaller packed checkpoint"))
        for size in ("1", "64"):
            if size in first["latency_ms"]:
                ratio = first["latency_ms_float"][size] / first["latency_ms"][size]
                facts.append(_speed(ratio, f"at batch {size} in {first['runtime']}"))
        if first["agreement"] is not None:
            facts.append((f"{first['agreement']:.2%}", "same answers as the PyTorch model"))
    return '<ul class="facts">' + "".join(f"<li><b>{a}</b>{html.escape(b)}</li>" for a, b in facts) + "</ul>"


def _speed(ratio: float, where: str) -> tuple[str, str]:
    return (f"{ratio:.2f}x", f"faster {where}") if ratio >= 1 else (f"{1 / ratio:.2f}x", f"slower {where}")


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
