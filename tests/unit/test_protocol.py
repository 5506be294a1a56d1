"""The benchmark's protocol: which trials there are, who wins, what is kept, and that its pages are current."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from experiments.arena import MAIN_TASKS, TASKS
from experiments.bench import proof, report
from experiments.methods import METHODS
from experiments.protocol import (
    FACTORS,
    MAIN,
    POINTS,
    Point,
    Trial,
    are_close,
    best_factor,
    compare,
    deployed,
    methods_of,
    tuning_trials,
)
from experiments.reached import most_values, what_is_missing
from experiments.records import Records
from experiments.standings import Standings
from experiments.tables import page, summary
from experiments.workers import run_trials

ZEROS = Point("zeros", 0.95)


def outcome(value: float | None, **others: Any) -> dict[str, Any]:
    return {
        "trained": value,
        "deployed": value,
        "failure": "" if value is not None else "broke",
        "start": "a",
        **others,
    }


def test_a_win_is_beyond_two_errors_and_beyond_the_least() -> None:
    ours = {0: 98.0, 1: 97.0, 2: 99.0}
    alike = {seed: value - 0.2 for seed, value in ours.items()}
    assert compare(ours, alike, True, 0.3).verdict == "tie"  # certain, and too small
    assert compare(ours, alike, True, 0.1).verdict == "win"
    assert compare(alike, ours, True, 0.1).verdict == "loss"
    assert compare(ours, {0: 97.0, 1: 97.5, 2: 97.2}, True, 0.3).verdict == "tie"  # large, and uncertain


def test_less_is_better_where_the_metric_says_so() -> None:
    compared = compare({0: 1.5, 1: 1.6}, {0: 1.7, 1: 1.8}, higher=False, least=0.01)
    assert (compared.verdict, compared.seeds) == ("win", 2)
    assert compared.difference == pytest.approx(0.2)


def test_one_pair_decides_nothing() -> None:
    compared = compare({0: 99.0}, {0: 50.0, 1: 99.0}, True, 0.3)
    assert (compared.verdict, compared.seeds) == ("tie", 1)
    assert math.isnan(compared.error)


def test_close_methods_get_more_seeds_until_there_are_five() -> None:
    first = {seed: 98.0 + seed % 2 for seed in range(3)}
    assert are_close(first, dict.fromkeys(range(3), 98.5))
    assert not are_close(first, {seed: value - 5 for seed, value in first.items()})
    five = {seed: 98.0 + seed % 2 for seed in range(5)}
    assert not are_close(five, dict.fromkeys(range(5), 98.5))


def test_every_method_of_a_kind_is_tuned_with_as_many_trials() -> None:
    for point in POINTS:
        nums = {len(tuning_trials("fsdd", point, name)) for name in methods_of(point)}
        assert nums <= {0, len(FACTORS[point.kind])}, point
    assert all(trial.cut and trial.seed == 0 for trial in tuning_trials("fsdd", ZEROS, "ours"))


def test_the_rate_is_the_best_on_the_cut_and_failures_do_not_count() -> None:
    trials = tuning_trials("fsdd", ZEROS, "ours")
    values: list[float | None] = [90.0, 92.0, None]
    tuned = {trial: outcome(value) for trial, value in zip(trials, values, strict=True)}
    assert best_factor(tuned, higher=True) == 2.0
    assert best_factor(tuned, higher=False) == 1.0
    assert best_factor({}, higher=True) == 1.0


def test_a_rate_is_the_best_over_all_cuts_and_out_where_it_failed_on_one() -> None:
    trials = tuning_trials("emoji", ZEROS, "ours", cuts=2)
    assert [(trial.seed, trial.factor) for trial in trials] == [(cut, rate) for cut in (0, 1) for rate in (1, 2, 4)]
    # 1x is best on the first cut, 2x on both together, 4x broke on the second
    values = (60.0, 58.0, 99.0, 50.0, 55.0, 0.0)
    tuned = {trial: {"trained": value, "failure": ""} for trial, value in zip(trials, values, strict=True)}
    tuned[trials[-1]]["failure"] = "ValueError: nan"
    assert best_factor(tuned, higher=True) == 2.0


def test_the_file_counts_and_what_failed_does_not() -> None:
    trials = [Trial("fsdd", *ZEROS, "ours", seed) for seed in range(3)]
    found = [outcome(98.0, deployed=97.0), outcome(96.0, deployed=None), outcome(None)]
    assert deployed(zip(trials, found, strict=True)) == {0: 97.0, 1: 96.0}


def test_every_point_has_ours_and_a_peer() -> None:
    for point in MAIN:
        roles = {METHODS[name, point.kind].role for name in methods_of(point)}
        assert {"ours", "peer"} <= roles, point


def test_records_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    path = tmp_path / "proof.json"
    records = Records(path, "python -m experiments.bench proof")
    trial = Trial("fsdd", *ZEROS, "ours", 0, 2.0)
    records.add(trial, outcome(98.0))
    again = Records(path)
    assert again.outcomes[trial]["trained"] == 98.0
    made = again.made[again.outcomes[trial]["by"]]
    assert {"command", "commit", "date", "python", "torch", "cpu", "features"} <= made.keys()
    assert len(path.read_text().splitlines()) == len(again.made) + len(again.outcomes) + 4  # a line a trial


def test_a_method_that_breaks_is_an_outcome(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    trial = Trial("quick", "macs", 1000.0, "Torch-Pruning GroupNorm", 0)
    run_trials([trial], tmp_path, tmp_path, 1, math.inf, lambda trial, outcome: found.append(outcome))
    (one,) = found
    assert "out of reach" in one["failure"]
    assert one["trained"] is None


@pytest.mark.nightly  # make bench-quick goes the same way
def test_a_small_table_from_dense_models_to_the_page(tmp_path: Path) -> None:
    results = tmp_path / "proof.json"
    methods = ["ours", "torch.nn.utils.prune"]
    made = proof.run(["quick"], [Point("zeros", 0.9)], methods, seeds=2, folder=tmp_path, results=results)
    assert [row["method"] for row in made["rows"]] == ["dense trained on", *methods]
    assert all(row["seeds"] == 2 and not row["failed"] for row in made["rows"])
    records = Records(results)
    # 2 dense, 2 methods of 3 rates on the cut and 2 seeds
    assert len(records.outcomes) == 12
    before = results.read_text()
    proof.run(["quick"], [Point("zeros", 0.9)], methods, seeds=2, folder=tmp_path, results=results)
    assert results.read_text() == before  # nothing was run again
    text = page(Standings(records))
    assert "### quick: 90 % zeros" in text
    assert "| *dense trained on* |" in text


def test_points_are_named_on_the_command_line() -> None:
    assert proof.point_of("zeros=0.95") == ZEROS
    with pytest.raises(Exception, match=r"no point 'zeros=95'; there are zeros=0.8"):
        proof.point_of("zeros=95")


def test_the_tables_of_the_readme_and_the_docs_are_current() -> None:
    made = report.files()
    for path, text in made.items():
        assert report.is_current(path, text), f"{path} is not current: run python -m experiments.bench report"


def test_ours_is_marked_like_the_others(tmp_path: Path) -> None:
    records = Records(tmp_path / "proof.json", "test")
    for method, values in (("ours", (95.0, 95.1, 95.2)), ("torch.nn.utils.prune", (97.0, 97.1, 97.2))):
        for seed, value in enumerate(values):
            records.add(Trial("fsdd", *ZEROS, method, seed), outcome(value))
    text = summary(Standings(records))
    assert "95.10 +- 0.10 < 97.10 +- 0.10 (torch.nn.utils.prune)" in text
    assert "wins 0, ties 0, losses 1" in text


def test_pairs_of_other_dense_models_are_not_compared(tmp_path: Path) -> None:
    records = Records(tmp_path / "proof.json", "test")
    for method, start in (("ours", "a"), ("torch.nn.utils.prune", "b")):
        for seed in range(3):
            records.add(Trial("fsdd", *ZEROS, method, seed), outcome(95.0 + seed, start=start))
    cell = Standings(records).cell("fsdd", ZEROS, "torch.nn.utils.prune")
    assert cell is not None
    assert cell.compared is None


def test_the_main_tasks_are_tasks() -> None:
    assert set(MAIN_TASKS) <= TASKS.keys()
    assert json.dumps([trial.plain for trial in tuning_trials("fsdd", ZEROS, "ours")])


def test_what_is_not_reached_is_a_failure() -> None:
    assert "it has 60.00" in what_is_missing(ZEROS, {"zeros": 0.6})
    assert "it has 3.50x" in what_is_missing(Point("macs", 4), {"macs": 3.5})
    assert "take 144 values" in what_is_missing(Point("bits", 2), {"zeros": 0.0, "values": 144})
    for point, found in (
        (ZEROS, {"zeros": 0.9499}),
        (Point("macs", 4), {"macs": 4.2}),
        (Point("bits", 2), {"values": 4}),
    ):
        assert what_is_missing(point, found) == ""
    # a tool that hides what it has is taken at its word
    assert what_is_missing(Point("bits", 2), {"zeros": 0.0, "values": None}) == ""


@pytest.mark.parametrize(("values", "linear"), [(2, 2), (16, 4), (4, 16)])
def test_values_of_weights_are_those_that_the_runtime_computes_with(values: int, linear: int, tmp_path: Path) -> None:
    """A convolution whose weights are stored as floats, and a linear layer whose weights are stored as integers."""
    rng = np.random.default_rng(0)
    scale = rng.random(3).astype(np.float32) + 0.5
    codes = rng.integers(0, values, (3, 4, 3, 3)).astype(np.float32)
    codes.reshape(3, -1)[:, :values] = np.arange(values)  # each of them is there
    tensors = {
        "w": codes * scale[:, None, None, None],
        "q": rng.integers(0, linear, (4, 300)).astype(np.int8),
        "s": np.float32(0.1),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["l"]),
        helper.make_node("Flatten", ["a"], ["f"]),
        helper.make_node("Gemm", ["f", "l"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    assert most_values(path, torch.zeros(2, 4, 12, 12)) == max(values, linear)
    assert most_values(path.with_suffix(".xml"), torch.zeros(1)) is None
