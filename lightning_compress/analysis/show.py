"""The report as one HTML file with pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_compress.analysis.latency import LATENCY_LEGEND, latency_table, speed
from lightning_compress.analysis.legend import legend_of_bytes, legend_of_models, legend_of_phases
from lightning_compress.analysis.model_card import how_to_load
from lightning_compress.analysis.page import html_table, picture, write_page
from lightning_compress.analysis.report import (
    TARGET_HEADERS,
    Report,
    change,
    describe_missed,
    headers,
    short,
    summary_rows,
    target_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_compress.deploy.judge import Judgement

__all__ = ["write_html"]


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
    phases = legend_of_phases(report)
    body = [
        f"<h1>Compression report{_of(report)}</h1>",
        *_asked(report),
        _facts(report),
        f"<p>{html.escape(_headline(report))}</p>",
        problems,
        "<h2>What compression bought</h2>",
        html_table(headers(report), summary_rows(report)),
        _legend([("params", "those that are not zero"), *legend_of_bytes(report), *legend_of_models(report)]),
        *_latency(report),
        "<h2>Pictures</h2>",
        *shown,
        _legend([("compress/phase", phases)] if phases else []),
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


def _asked(report: Report) -> list[str]:
    """What was asked against what was reached, and why something was missed."""
    targets = report.get("targets", [])
    if not targets:
        return []
    classes = ["missed" if row["missed"] else "" for row in targets]
    missed = [describe_missed(row) for row in targets if row["missed"]]
    return [
        html_table(TARGET_HEADERS, target_rows(report), classes),
        *(f'<p class="missed">{html.escape(text)}</p>' for text in missed),
    ]


def _latency(report: Report) -> list[str]:
    names, rows = latency_table(report)
    if not rows:
        return []
    return ["<h2>Milliseconds</h2>", html_table(names, rows), f'<p class="legend">{html.escape(LATENCY_LEGEND)}</p>']


def _legend(words: Sequence[tuple[str, str]]) -> str:
    return "".join(f'<p class="legend"><b>{html.escape(a)}</b>: {html.escape(b)}</p>' for a, b in words)


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
        for batch in first["latency_ms"]:
            number, _, words = speed(first, batch).partition(" ")
            where = f"in float at batch {batch} in {first['runtime']}"
            if words in ("faster", "slower"):
                facts.append((number, f"{words} than {where}"))
        if first["agreement"] is not None:
            facts.append((f"{first['agreement']:.2%}", "same answers as the PyTorch model"))
    return '<ul class="facts">' + "".join(f"<li><b>{a}</b>{html.escape(b)}</li>" for a, b in facts) + "</ul>"


def _judged(judged: Mapping[str, Judgement]) -> str:
    """What a file misses of what was asked of it."""
    missed = {name: x for name, x in judged.items() if x["ok"] is False}
    said = [f"{name} {_show(x['reached'])}, asked {_show(x['asked'])}" for name, x in missed.items()]
    return "; ".join(said) or ("passed" if any(x["ok"] for x in judged.values()) else "-")


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
