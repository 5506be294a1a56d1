"""The frontier against its definition, and what is written."""

from __future__ import annotations

import io
import json
import math
import random
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_compress.analysis.pareto import Frontier, frontier
from lightning_compress.analysis.runs import (
    COSTS,
    Run,
    differing,
    failed_jobs,
    jobs_without_report,
    note_failure,
    read_runs,
)


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
    found = frontier("m", runs, "latency_ms")
    assert [r.name for r in found.runs] == ["b"]
    assert found.left_out == {"a": "its report has no ms at batch 1"}
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
    assert a.overrides == {"experiment": "x", "objective": "[a.0,\\n      b]"}
    assert b.overrides == {}


def test_what_a_report_holds_of_spread_samples_and_page_is_read(tmp_path: Path) -> None:
    report(tmp_path / "0", 0.9, 100, validation_samples=500)
    path = tmp_path / "0" / "report.json"
    found = json.loads(path.read_text())
    found["artifacts"][0] |= {"latency_ms_quartiles": {"1": [0.4, 0.6]}, "runtime": "onnxruntime"}
    path.write_text(json.dumps(found))
    (tmp_path / "0" / "report.html").write_text("")
    _, (a,) = read_runs(tmp_path)
    assert (a.latency_ms_quartiles, a.runtime, a.samples, a.report) == ((0.4, 0.6), "onnxruntime", 500, "0/report.html")


def test_jobs_that_failed_are_told_from_those_that_left_nothing_and_from_files_of_others(tmp_path: Path) -> None:
    for name in ("0", "1", "2"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
    report(tmp_path / "2" / "below", 0.9, 100)
    note_failure(tmp_path / "0", ValueError("no such\ncriterion"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "failed.txt").write_text("of somebody else")
    assert failed_jobs(tmp_path) == {"0": "it failed: ValueError: no such"}
    assert failed_jobs(tmp_path, since=time.time() + 60) == {}
    found = jobs_without_report(tmp_path)
    assert list(found) == ["0", "1"]
    assert found["1"].startswith("it left no report")
    note_failure(tmp_path / "0", None)
    assert failed_jobs(tmp_path) == {}


def test_fields_of_the_same_last_word_keep_their_whole_names() -> None:
    asked = [{"prune.sparsity": "1", "head.sparsity": str(i), "dir": str(i)} for i in range(2)]
    asked[1]["prune.sparsity"] = "2"
    runs = [replace(run(str(i), 0.9, 1), overrides=fields) for i, fields in enumerate(asked)]
    assert differing(runs) == (["prune.sparsity", "head.sparsity"], [["1", "0"], ["2", "1"]])


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
    text = printed(found)
    assert all(word in text for name in ("val_acc", *COSTS.values()) for word in name.split())
    assert re.search(r"a<b \*", text)


def printed(found: Frontier, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(found.table())
    return console.export_text()


def test_eighty_columns_hold_a_sweep_of_two_fields(tmp_path: Path) -> None:
    asked = [{"compression.prune.sparsity": str(x), "seed": str(y)} for x in (0.5, 0.9) for y in (0, 1)]
    runs = [replace(run(str(i), 0.9 + i / 100, 100_000), overrides=fields) for i, fields in enumerate(asked)]
    runs = [replace(one, latency_ms=0.0461, latency_ms_quartiles=(0.0454, 0.0479)) for one in runs]
    text = printed(frontier("val_acc", runs))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert text.count("(0.0454-0.0479)") == 4
    assert text.index("sparsity=") < text.index("seed=") < text.index("val_acc", text.index("seed="))


def spread(name: str, metric: float, ms: float, low: float, high: float, runtime: str = "onnxruntime") -> Run:
    return replace(run(name, metric, 1, ms), latency_ms_quartiles=(low, high), runtime=runtime)


def names_of(found: Frontier, indices: list[int]) -> list[str]:
    return [found.runs[i].name for i in indices]


def test_seeds_of_one_setting_tell_the_noise_and_a_gain_within_it_is_no_frontier() -> None:
    def seeds(size: int, *metrics: float) -> list[Run]:
        return [
            replace(run(f"{size}/{i}", metric, size), overrides={"size": str(size), "seed": str(i)})
            for i, metric in enumerate(metrics)
        ]

    runs = [*seeds(10, 0.900, 0.904), *seeds(20, 0.908, 0.912), *seeds(30, 0.950, 0.954)]
    found = frontier("val_loss", runs, more_is_better=True)
    deviation = math.sqrt(2) * 0.002  # of each pair
    assert found.noise == pytest.approx(2 * math.sqrt(2) * deviation)
    assert "deviate by 0.0028" in found.noise_from
    assert names_of(found, found.best) == ["10/1", "30/1"]
    assert names_of(found, found.within_noise) == ["20/1"]
    far = frontier("val_loss", [*seeds(10, 0.9, 0.9001), *seeds(20, 0.91, 0.9101)])
    assert names_of(far, far.best) == ["10/1", "20/1"]


def test_an_accuracy_over_few_samples_tells_little_apart() -> None:
    runs = [run("a", 0.90, 10), run("b", 0.92, 20), run("c", 0.99, 30)]
    few = frontier("val_acc", [replace(one, samples=500) for one in runs])
    share = 2.81 / 3
    assert few.noise == pytest.approx(2 * math.sqrt(2 * share * (1 - share) / 500))
    assert names_of(few, few.best) == ["a", "c"]
    many = frontier("val_acc", [replace(one, samples=50_000) for one in runs])
    assert names_of(many, many.best) == ["a", "b", "c"]
    percent = frontier("val_acc", [replace(one, metric=100 * one.metric, samples=500) for one in runs])
    assert percent.noise == pytest.approx(100 * few.noise)
    for unknown in (frontier("val_loss", runs), frontier("val_acc", [*runs[:2], replace(runs[2], samples=9)])):
        assert unknown.noise == 0
        assert "varies by chance is not known" in unknown.noise_from


def test_milliseconds_whose_quartiles_overlap_are_the_same_cost() -> None:
    fast, better = spread("fast", 0.90, 0.25, 0.20, 0.30), spread("better", 0.95, 0.27, 0.22, 0.33)
    found = frontier("m", [fast, better], "latency_ms")
    assert names_of(found, found.best) == ["better"]
    assert names_of(found, found.within_noise) == ["fast"]
    slower = spread("slower", 0.95, 0.40, 0.35, 0.50)
    found = frontier("m", [fast, slower], "latency_ms")
    assert names_of(found, found.best) == ["fast", "slower"]


def test_milliseconds_of_two_runtimes_share_neither_a_frontier_nor_a_column(tmp_path: Path) -> None:
    runs = [spread("a", 0.9, 0.25, 0.2, 0.3), spread("b", 0.95, 0.5, 0.4, 0.6)]
    runs.append(spread("c", 0.99, 0.1, 0.1, 0.1, "PyTorch"))
    found = frontier("m", runs, "latency_ms")
    assert names_of(found, found.best) == ["a", "b"]
    assert found.left_out == {"c": "it was timed in PyTorch, and most others in onnxruntime"}
    frontier("m", runs).write(tmp_path)
    page = (tmp_path / "pareto.html").read_text()
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?>(.*?)</tr>", page)]
    columns = {column[0]: list(column[1:]) for column in zip(*cells, strict=True)}
    assert columns["ms at batch 1, onnxruntime"] == ["-", "0.5 (0.4-0.6)", "0.25 (0.2-0.3)"]
    assert columns["ms at batch 1, PyTorch"] == ["0.1 (0.1-0.1)", "-", "-"]


@pytest.mark.parametrize(("more_is_better", "way"), [(True, "more"), (False, "less")])
def test_axes_say_which_way_is_better(more_is_better: bool, way: str) -> None:
    (axes,) = frontier("m", [run("a", 0.9, 10), run("b", 0.8, 20)], more_is_better=more_is_better).figure().axes
    assert axes.get_xlabel() == "bytes (less is better)"
    assert axes.get_ylabel() == f"m ({way} is better)"


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
