"""The report: table, JSON, HTML and pictures."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_compress.analysis.history import History, figures
from lightning_compress.analysis.latency import latency_table, latency_values, speed
from lightning_compress.analysis.report import headers, summary_rows, write_json
from lightning_compress.analysis.show import write_html
from lightning_compress.analysis.terminal import terminal_report


def make_report(**changes: Any) -> dict[str, Any]:
    dense = {"metric": 0.9876, "sparsity": 0.0, "num_params": 266_610, "num_nonzero": 266_610, "macs": 266_200}
    dense |= {"bytes": 1_066_440, "bytes_zstd": 987_000}
    compressed = dense | {
        "metric": 0.975,
        "sparsity": 0.9,
        "num_nonzero": 27_000,
        "bytes": 270_000,
        "bytes_zstd": 52_000,
    }
    artifact = {"format": "onnx", "runtime": "onnxruntime", "path": "out/model.onnx", "bytes": 270_000}
    artifact |= {
        "bytes_zstd": 52_000,
        "metric": 0.974,
        "max_abs_diff": 0.0123,
        "agreement": 0.9975,
        "max_rel_diff": 0.001,
        "cpu": "x86_64 AVX2",
        "deployed_minus_trained": -0.001,
        "judged": {"difference": {"asked": 0.0005, "reached": 0.001, "ok": False}},
    }
    artifact |= {"latency_ms": {"1": 0.25, "64": 2.0}, "latency_ms_float": {"1": 0.5, "64": 3.0}}
    artifact |= {"latency_ms_quartiles": {"1": [0.24, 0.27], "64": [1.9, 2.9]}}
    artifact |= {"latency_ms_float_quartiles": {"1": [0.49, 0.6], "64": [2.8, 3.5]}}
    artifact |= {"times_faster": {"1": [2.0, 1.9, 2.1], "64": [1.5, 0.9, 1.7]}}
    layer = {"name": "net.<0>", "type": "Linear", "num_params": 235_200, "sparsity": 0.9, "weight_bits": 8}
    layer |= {"input_bits": 8, "macs": 235_200, "bytes": 52_920}
    report = {"metric": "val_acc", "dense": dense, "control": None, "compressed": compressed, "layers": [layer]}
    report |= {"packed": {"path": "packed.safetensors", "bytes": 30_000}}
    report |= {"artifacts": [artifact], "seconds": {"fit": 12.3, "overhead": 1.2}, "warnings": [], "targets": []}
    report |= {"latency_ms_pytorch": {"1": 1.5}, "latency_ms_pytorch_quartiles": {"1": [1.4, 1.6]}}
    report |= {"steps": {"dense": 120, "control": None, "compressed": 600}, "phases": ["dense", "prune"]}
    return report | changes


TARGET = {"callback": "GradualPruning", "target": "sparsity", "asked": 0.95, "reached": 0.9, "missed": True}
TARGET |= {"because": "the run ended"}


def make_history() -> History:
    return History(
        steps=[0, 10, 20],
        sparsity={"a": [0.0, 0.4, 0.9], "b": [0.0, 0.5, 0.8]},
        bits={"a": [32, 32, 8], "b": [32, 32, 4]},
        metric=[[5, 0.5], [15, 0.9]],
        phases=[[0, "dense"], [10, "prune"]],
        bins=[-1.0, 0.0, 1.0],
        before=[4.0, 6.0],
        after=[1.0, 2.0],
    )


class Page(HTMLParser):
    """Texts of the cells, row by row, the pictures, the addresses, and tags that were never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.images += [value for key, value in attrs if tag == "img" and key == "src"]
        self.addresses += [value for key, value in attrs if key in ("href", "src") and not value.startswith("data:")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def page_of(report: dict[str, Any], history: History, folder: Path) -> tuple[str, Page]:
    write_html(report, figures(history, report["metric"]), folder / "below" / "report.html")
    text = (folder / "below" / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_a_row_a_model_with_its_step_and_a_row_a_file() -> None:
    steps = {"dense": 120, "control": 600, "compressed": 600}
    assert summary_rows(make_report(control=make_report()["dense"] | {"metric": 0.9}, steps=steps)) == [
        ["dense (step 120)", "0.9876", "0.0%", "267k", "266k", "1.07M", "987k", "-"],
        ["dense trained on", "0.9000", "0.0%", "267k", "266k", "1.07M", "987k", "-"],
        ["compressed", "0.9750", "90.0%", "27k", "266k", "270k", "52k", "-"],
        ["model.onnx", "0.9740", "90.0%", "27k", "266k", "270k", "52k", "-0.0010"],
    ]
    steps["control"] = 300  # of another length
    report = make_report(control=make_report()["dense"], steps=steps)
    assert summary_rows(report)[1][0] == "dense trained on (step 300)"


def test_what_was_not_measured_is_a_dash() -> None:
    report = make_report(artifacts=[], dense=None)
    report["compressed"] |= {"metric": None, "macs": None, "bytes": None}
    assert summary_rows(report) == [["compressed", "-", "90.0%", "27k", "-", "-", "52k", "-"]]


def test_each_runtime_has_a_column_of_milliseconds_with_their_quartiles() -> None:
    assert latency_table(make_report()) == (
        ["ms", "model.onnx in onnxruntime", "compressed in PyTorch"],
        [
            ["batch 1", "0.25 (0.24-0.27)", "1.5 (1.4-1.6)"],
            ["batch 1, float twin", "0.5 (0.49-0.6)", "-"],
            ["batch 1, compared", "2.00x faster", "-"],
            ["batch 64", "2 (1.9-2.9)", "-"],
            ["batch 64, float twin", "3 (2.8-3.5)", "-"],
            ["batch 64, compared", "no difference beyond noise", "-"],
        ],
    )
    columns, rows = latency_values(make_report())
    assert dict(zip(columns, rows[0], strict=True)) == {
        "runtime": "onnxruntime",
        "file": "model.onnx",
        "batch": 1,
        "ms": 0.25,
        "low": 0.24,
        "high": 0.27,
        "float ms": 0.5,
        "float low": 0.49,
        "float high": 0.6,
    }
    assert rows[-1] == ["PyTorch", "compressed", 1, 1.5, 1.4, 1.6, None, None, None]


def test_a_slower_file_is_called_slower_and_one_without_a_spread_neither() -> None:
    (artifact,) = make_report()["artifacts"]
    assert speed(artifact | {"times_faster": {"1": [0.5, 0.4, 0.8]}}, "1") == "2.00x slower"
    assert speed(artifact | {"times_faster": {}}, "1") == "no difference beyond noise"


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        *((0, "0"), (7, "7"), (999, "999"), (1000, "1k"), (77_800, "77.8k"), (999_400, "999k")),
        *((1_234_567, "1.23M"), (2_500_000_000, "2.5G")),
        *((999_600, "1M"), (999_999_999, "1G"), (4_120_000_000_000, "4.12T")),
    ],
)
def test_a_count_is_shown_short(count: int, expected: str) -> None:
    report = make_report(artifacts=[], dense=None)
    report["compressed"]["macs"] = count
    assert summary_rows(report)[0][4] == expected


def test_the_metrics_name_heads_its_column() -> None:
    assert headers(make_report())[1] == "val_acc"
    assert headers(make_report(metric=None))[1] == "metric"


def printed(report: dict[str, Any], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for part in terminal_report(report):  # type: ignore[arg-type]
        console.print(part)
    return console.export_text()


def test_the_terminal_shows_every_cell() -> None:
    report = make_report(targets=[TARGET])
    text = printed(report, 160)
    names, rows = latency_table(report)  # type: ignore[arg-type]
    shown = [headers(report), *summary_rows(report), names, *rows, ["sparsity", "0.95", "missed"]]  # type: ignore[arg-type]
    assert all(word in text for row in shown for cell in row for word in cell.split())
    assert "target not reached: asked sparsity 0.95, reached 0.9, because the run ended." in text
    assert text.index("asked and reached") < text.index("what compression bought") < text.index("milliseconds")
    assert "packed (30k): " in text


def test_eighty_columns_hold_the_report_of_six_runtimes_whole() -> None:
    (artifact,) = make_report()["artifacts"]
    runtimes = ["onnxruntime", "OpenVINO", "ExecuTorch", "LiteRT", "PyTorch Inductor", "TensorFlow Lite Micro"]
    many = [artifact | {"runtime": name, "path": f"out/a_longer_name_than_most.{name[:4]}"} for name in runtimes]
    text = printed(make_report(artifacts=many, targets=[TARGET], metric="val_balanced_accuracy"), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert text.count("0.24-0.27") == len(runtimes)


def test_the_json_is_the_report(tmp_path: Path) -> None:
    write_json(make_report(), tmp_path / "below" / "report.json")
    assert json.loads((tmp_path / "below" / "report.json").read_text()) == make_report()


def test_the_json_of_a_run_that_diverged_is_still_json(tmp_path: Path) -> None:
    write_json(make_report(dense={"metric": float("nan")}), tmp_path / "report.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)


def test_the_page_shows_tables_pictures_and_facts_and_loads_nothing(tmp_path: Path) -> None:
    report = make_report()
    text, page = page_of(report, make_history(), tmp_path)
    assert page.open == []
    assert page.rows[: 1 + len(summary_rows(report))] == [headers(report), *summary_rows(report)]
    assert [
        *("model.onnx", "onnxruntime", "0.974", "0.9975", "0.0123", "0.001", "-0.0010"),
        *("difference 0.001, asked 0.0005", "-", "", "x86_64 AVX2"),
    ] in page.rows
    assert ["net.<0>", "Linear", "235k", "235k", "52.9k", "90.0%", "8", "8"] in page.rows
    assert page.addresses == []
    assert len(page.images) == 4
    for image in page.images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    for fact in ("90.0%", "3.9x", "35.5x", "2.00x", "99.75%", "12 s", "1 s"):
        assert fact in text
    assert "1.50x" not in text  # of batch 64 the quartiles overlap
    assert "no difference beyond noise" in text
    names, rows = latency_table(report)  # type: ignore[arg-type]
    assert [names, *rows] == page.rows[len(summary_rows(report)) + 1 :][: len(rows) + 1]  # type: ignore[arg-type]
    assert "<b>compress/phase</b>: 0 dense, 1 prune" in text


def test_the_page_begins_with_what_was_asked_against_what_was_reached(tmp_path: Path) -> None:
    text, page = page_of(make_report(targets=[TARGET]), History(), tmp_path)
    assert page.rows[:2] == [
        ["target", "asked", "reached", "verdict", "of"],
        ["sparsity", "0.95", "0.9", "missed", "GradualPruning"],
    ]
    assert text.index("</h1>") < text.index("<table>") < text.index("because the run ended") < text.index("<ul")


def test_the_download_is_compared_compressed_with_compressed(tmp_path: Path) -> None:
    text, _ = page_of(make_report(), History(), tmp_path)
    assert "<b>19.0x</b>smaller download (zstd)" in text


def test_names_and_warnings_are_escaped(tmp_path: Path) -> None:
    text, _ = page_of(make_report(warnings=["Export failed: <script>alert(1)</script>"]), History(), tmp_path)
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "net.&lt;0&gt;" in text


def test_a_page_without_files_dense_model_or_history(tmp_path: Path) -> None:
    _, page = page_of(make_report(artifacts=[], dense=None, metric=None, layers=[]), History(), tmp_path)
    assert page.open == []
    assert page.images == []
    assert [row[0] for row in page.rows[:2]] == ["model", "compressed"]


def test_each_picture_is_drawn_where_there_is_something_to_draw() -> None:
    assert list(figures(make_history(), "val_acc")) == ["metric", "sparsity", "bits", "weights"]
    assert figures(History(), None) == {}
    assert list(figures(History(metric=[[0, 0.1]]), None)) == ["metric"]


def test_the_pictures_hold_the_numbers() -> None:
    made = figures(make_history(), "val_acc")
    (axes, _) = made["sparsity"].axes
    assert axes.collections[0].get_array().tolist() == [[0.0, 0.4, 0.9], [0.0, 0.5, 0.8]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    (axes, bar) = made["bits"].axes
    assert axes.collections[0].get_array().tolist() == [[32, 32, 8], [32, 32, 4]]
    assert [label.get_text() for label in bar.get_yticklabels()][-3:] == ["8", "16", "32"]
    (axes,) = made["metric"].axes
    assert axes.lines[0].get_xydata().tolist() == [[5.0, 0.5], [15.0, 0.9]]
    assert [text.get_text().strip() for text in axes.texts] == ["dense", "prune"]
    (axes,) = made["weights"].axes
    assert [patch.get_data().values.tolist() for patch in axes.patches] == [[4.0, 6.0], [1.0, 2.0]]


def test_the_layers_over_time_are_a_row_for_each_look() -> None:
    rows = make_history().rows
    assert len(rows) == 6
    assert rows[0] == [0, "a", 0.0, 32]
    assert rows[-1] == [20, "b", 0.8, 4]


def test_a_history_comes_back_from_plain_values() -> None:
    history = make_history()
    state = json.loads(json.dumps(history.to_state()))
    assert History.from_state(state) == history
    history.steps.append(30)
    assert state["steps"] == [0, 10, 20]
