"""The report as people see it: a table for the terminal, and one HTML file with pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from lightning_compress.analysis.model_card import how_to_load
from lightning_compress.analysis.page import html_table, picture, write_page
from lightning_compress.analysis.report import Report, change, describe_missed, headers, short, summary_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_compress.deploy.judge import Judgement

__all__ = ["terminal_table", "write_html"]


def terminal_table(report: Report) -> Table:
    """The table for a terminal."""
    table = Table(title="what compression bought", box=box.SIMPLE_HEAD, padding=0, header_style="bold", show_edge=False)
    for i, name in enumerate(headers(report)):
        table.add_column(name.replace(" minus ", "\nminus\n"), justify="right" if i else "left", no_wrap=True)
    for row in summary_rows(report):
        table.add_row(*(f" {cell}" if i else cell for i, cell in enumerate(row)))
    return table


_CAPTIONS = {
    "metric": "The validation metric over the phases.",
    "sparsity": "Sparsity of each layer over the run.",
    "bits": "Bits of each layer's weights over the run.",
    "weights": "Weights of all counted layers, before compression and at the end.",
}


def write_html(report: Report, pictures: Mapping[str, Figure], path: Path) -> None:
    """Write one self-contained report.html."""
    shown = [picture(figure, _CAPTIONS[name]) for name, figure in pictures.items()]
    if not shown:
        shown.append("<p>No pictures: pip install 'lightning-compress[report]'.</p>")
    missed = [describe_missed(row) for row in report.get("targets", []) if row["missed"]]
    missed_lines = "".join(f'<p class="missed">{html.escape(text)}</p>' for text in missed)
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
                *(change(a.get("deployed_minus_trained")), _judged(a.get("judged", {}))),
            ),
            *(f"{a['integer_kernels']} of {a['num_kernels']}" if a.get("num_kernels") else "-", a.get("batch", "")),
            a.get("cpu", ""),
        ]
        for a in report["artifacts"]
    ]
    body = [
        f"<h1>Compression report{_of(report)}</h1>",
        f"<p>{html.escape(_headline(report))}</p>",
        missed_lines,
        _facts(report),
        problems,
        "<h2>What compression bought</h2>",
        html_table(headers(report), summary_rows(report)),
        "<p>Params are those that are not zero. The dense models are one float graph, timed once, interleaved with the "
        "exported file in the same runtime, and only where the file has their shape; the compressed model is timed in "
        "PyTorch. Medians, one thread. "
        "Bytes are of the exported file.</p>",
        "<h2>Pictures</h2>",
        *shown,
        "<h2>Proof of the files</h2>",
        html_table(
            [
                *("file", "runtime", report["metric"] or "metric", "agreement", "max abs diff", "of range"),
                *("deployed minus trained", "judged"),
                *("integer kernels", "batch", "run on"),
            ],
            proof,
        ),
        "<h2>How to load the files</h2>",
        *_loading(report),
        "<h2>Layers</h2>",
        html_table(layer_names, layers),
        "<h2>What this is a report of</h2>",
        _origin(report),
    ]
    write_page(path, "Compression report", body)


def _of(report: Report) -> str:
    model = report.get("origin", {}).get("model", "").rpartition(".")[2]
    return html.escape(f" of {model}" if model else "")


def _origin(report: Report) -> str:
    rows = [[html.escape(key), html.escape(value)] for key, value in report.get("origin", {}).items()]
    return "<dl>" + "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows) + "</dl>"


def _loading(report: Report) -> list[str]:
    """A few lines of Python for each file."""
    files = {a["path"]: a.get("inputs") or [] for a in report["artifacts"]}
    packed = report.get("packed")
    files |= {packed["path"]: []} if packed else {}
    shown = []
    for path, inputs in files.items():
        name = Path(path).name
        lines = html.escape(how_to_load(name, inputs))
        shown.append(f"<details><summary>{html.escape(name)}</summary><pre>{lines}</pre></details>")
    return shown


def _headline(report: Report) -> str:
    seconds = report["seconds"]
    return f"Trained for {seconds['fit']:.0f} s, of which {seconds['overhead']:.0f} s for measuring and reporting."


def _facts(report: Report) -> str:
    facts = [(f"{report['compressed']['sparsity']:.1%}", "of the weights are zero")]
    if report["artifacts"]:
        first = report["artifacts"][0]
        dense = report["dense"]
        size = dense["bytes"] if dense else None
        download = dense["bytes_zstd"] if dense else None
        packed = report.get("packed")
        if size:
            facts.append((f"{size / first['bytes']:.1f}x", "smaller file"))
        if download:
            facts.append((f"{download / first['bytes_zstd']:.1f}x", "smaller download (zstd)"))
        if packed and size:
            facts.append((f"{size / packed['bytes']:.1f}x", "smaller packed checkpoint"))
        for batch in ("1", "64"):
            if batch in first["latency_ms"]:
                ratio = first["latency_ms_float"][batch] / first["latency_ms"][batch]
                facts.append(_speed(ratio, f"than in float at batch {batch} in {first['runtime']}"))
        if first["agreement"] is not None:
            facts.append((f"{first['agreement']:.2%}", "same answers as the PyTorch model"))
    return '<ul class="facts">' + "".join(f"<li><b>{a}</b>{html.escape(b)}</li>" for a, b in facts) + "</ul>"


def _speed(ratio: float, where: str) -> tuple[str, str]:
    return (f"{ratio:.2f}x", f"faster {where}") if ratio >= 1 else (f"{1 / ratio:.2f}x", f"slower {where}")


def _judged(judged: Mapping[str, Judgement]) -> str:
    """What a file misses of what was asked of it."""
    missed = {name: x for name, x in judged.items() if x["ok"] is False}
    said = [f"{name} {_show(x['reached'])}, asked {_show(x['asked'])}" for name, x in missed.items()]
    return "; ".join(said) or ("passed" if any(x["ok"] for x in judged.values()) else "-")


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
