"""The frontier against its definition, and what is written."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_compress.analysis.pareto import frontier
from lightning_compress.analysis.runs import COSTS, Run, read_runs


def run(name: str, metric: float, size: int | None, latency: float | None = 1.0) -> Run:
    return Run(name, metric, size, size, latency, size, 0.5, f"lightning-compress a={name}")


def report(folder: Path, metric: float, size: int, name: str = "val_acc", file: bool = True, **more: Any) -> None:
    folder.mkdir(parents=True)
    totals = {"metric": metric + 0.001, "bytes": 9 * size, "bytes_zstd": 8 * size, "macs": 7, "sparsity": 0.25}
    artifact = {"metric": metric, "bytes": size, "bytes_zstd": size // 2, "latency_ms": {"1": 0.5, "64": 9.0}}
    found = {"metric": name, "compressed": totals, "artifacts": [artifact] if file else [], "latency_ms_pytorch": {}}
    (folder / "report.json").write_text(json.dumps({**found, **more}))


@pytest.mark.parametrize("more_is_better", [True, False])
def test_nobody_on_the_frontier_is_beaten_and_everybody_else_is(more_is_better: bool) -> None:
    for seed in range(20):
        assert_frontier(random.Random(seed), more_is_better)


def assert_frontier(rng: random.Random, more_is_better: bool) -> None:
    runs = [run(str(i), rng.choice([0.1, 0.2, 0.3, 0.4, 0.5]), rng.randrange(1, 6)) for i in range(12)]
    found = frontier("m", runs, more_is_better=more_is_better)

    def beats(a: Run, b: Run) -> bool:
        better = a.metric - b.metric if more_is_better else b.metric - a.metric
        return better >= 0 and a.bytes <= b.bytes and (better > 0 or a.bytes < b.bytes)

    best = [found.runs[i] for i in found.best]
    assert len(found.runs) == 12
    for one in found.runs:
        beaten = any(beats(other, one) for other in found.runs)
        # of equals, one is enough
        assert beaten != (one in best) or any((o.metric, o.bytes) == (one.metric, one.bytes) for o in best)
    assert not any(beats(other, one) for one in best for other in found.runs)


def test_the_cheapest_within_the_drop_is_taken() -> None:
    runs = [run("a", 0.99, 100), run("b", 0.987, 60), run("c", 0.95, 10), run("d", 0.986, 90)]
    assert [r.name for r in frontier("m", runs).runs] == ["c", "b", "d", "a"]
    for drop, name in ((0.0, "a"), (0.005, "b"), (0.1, "c")):
        found = frontier("m", runs, max_drop=drop)
        assert found.runs[found.chosen].name == name


def test_a_run_without_the_cost_is_left_out_and_an_unknown_cost_refused() -> None:
    runs = [run("a", 0.9, 10, None), run("b", 0.8, 20, 2.0)]
    assert [r.name for r in frontier("m", runs, "latency_ms").runs] == ["b"]
    with pytest.raises(ValueError, match=r"pareto.cost='weight': accepted are 'bytes'"):
        frontier("m", runs, "weight")
    with pytest.raises(ValueError, match="no run has it"):
        frontier("m", runs[:1], "latency_ms")


def test_reports_are_read_from_the_file_where_there_is_one(tmp_path: Path) -> None:
    report(tmp_path / "0", 0.9, 100)
    report(tmp_path / "deep" / "1", 0.8, 50, file=False)
    (tmp_path / "0" / ".hydra").mkdir()
    (tmp_path / "0" / ".hydra" / "hydra.yaml").write_text(
        "hydra:\n  overrides:\n    hydra: [hydra.mode=MULTIRUN, 'hydra.searchpath=[file://a]']\n"
        "    task: [experiment=x, 'objective=[a.0,\\n      b]']\n"
    )
    metric, (a, b) = read_runs(tmp_path)
    assert metric == "val_acc"
    assert (a.name, a.metric, a.bytes, a.latency_ms) == ("0", 0.9, 100, 0.5)
    assert shlex.split(a.command)[:2] == ["lightning-compress", "experiment=x"]
    assert shlex.split(a.command)[2].startswith("objective=[a.0,")
    assert shlex.split(a.command)[3:] == ["hydra.searchpath=[file://a]"]
    assert (b.name, b.metric, b.bytes, b.latency_ms) == ("deep/1", 0.801, 450, None)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no report.json"):
        read_runs(tmp_path)
    report(tmp_path / "0", 0.9, 100)
    report(tmp_path / "1", 0.9, 100, name="val_loss")
    with pytest.raises(ValueError, match="different metrics, val_acc, val_loss"):
        read_runs(tmp_path)


def test_written_as_json_page_and_picture(tmp_path: Path) -> None:
    found = frontier("val_acc", [run("a<b", 0.99, 100), run("b", 0.98, 60), run("c", 0.97, 80)])
    found.write(tmp_path)
    state = json.loads((tmp_path / "pareto.json").read_text())
    assert [(r["name"], r["on_frontier"]) for r in state["runs"]] == [("b", True), ("c", False), ("a<b", True)]
    page = (tmp_path / "pareto.html").read_text()
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert page.count('class="pale"') == 1
    assert page.count('class="chosen"') == 1
    assert "data:image/png;base64," in page
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=120)
    with console.capture() as captured:
        console.print(found.table())
    text = captured.get()
    assert all(name in text for name in ("val_acc", *COSTS.values()))
    assert re.search(r"\*\s+a<b", text)


def test_a_run_that_missed_a_target_is_marked(tmp_path: Path) -> None:
    row = {"callback": "GradualPruning", "target": "sparsity", "asked": 0.9, "reached": 0.2, "missed": True}
    targets = [{**row, "because": "the run ended"}, {**row, "target": "other", "missed": False, "because": ""}]
    report(tmp_path / "a", 0.9, 100)
    report(tmp_path / "b", 0.8, 50, targets=targets)
    metric, runs = read_runs(tmp_path)
    found = frontier(metric, runs)
    found.write(tmp_path)
    page = (tmp_path / "pareto.html").read_text()
    assert page.count("(target missed)") == 1
    assert "b: GradualPruning: target not reached: asked sparsity 0.9, reached 0.2, because the run ended." in page
    assert [run["missed"] != [] for run in json.loads((tmp_path / "pareto.json").read_text())["runs"]] == [True, False]
