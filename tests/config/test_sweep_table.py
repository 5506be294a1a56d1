"""The one table at the end of a sweep, whose jobs differ, fail, or leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

from .test_commands import command

OWN = [
    *("model._target_=tests.config.own_data.Deep", "data=mlp", "logger=none", "compression=magnitude"),
    *("data._target_=lightning.pytorch.LightningDataModule.from_datasets", "trainer.max_epochs=4"),
    *("trainer.accelerator=cpu", "~compression.export", "compression.prune.sparsity=0.5,0.9,2.0"),
    f"hydra.searchpath=[file://{Path(__file__).parent}]",
]


def test_a_job_that_fails_costs_the_sweep_neither_the_others_nor_their_table(tmp_path: Path) -> None:
    text = command("-m", *OWN, f"hydra.sweep.dir={tmp_path}", "trainer.accelerator=cpu", ok=False)
    assert text.count("runs, val_acc against") == 1
    assert "2 runs, val_acc against" in text
    reason = "2: it failed: "
    assert reason in text
    assert "GradualPruning.sparsity=2.0: accepted is" in text.partition(reason)[2]
    assert text.rstrip().endswith("Of the sweep failed: 2.")
    assert "Traceback" not in text
    assert "Traceback" in (tmp_path / "2" / "failed.txt").read_text()
    state = json.loads((tmp_path / "pareto.json").read_text())
    assert list(state["left_out"]) == ["2"]
    assert {run["overrides"]["compression.prune.sparsity"] for run in state["runs"]} == {"0.5", "0.9"}
    page = (tmp_path / "pareto.html").read_text()
    assert "<th>sparsity=</th>" in page
    assert '<a href="0/report.html">' in page
    assert "Left out 2: it failed" in page
    for run in state["runs"]:
        assert (tmp_path / run["report"]).is_file()


def test_a_sweep_without_reports_says_so_and_names_its_jobs(tmp_path: Path) -> None:
    sweep = [word for word in OWN if "sparsity" not in word] + ["~compression.report", "seed=1,2"]
    text = command("-m", *sweep, f"hydra.sweep.dir={tmp_path}")
    assert "0: it left no report: it has no CompressionReport" in text
    assert "1: it left no report" in text
    assert not (tmp_path / "pareto.html").exists()
