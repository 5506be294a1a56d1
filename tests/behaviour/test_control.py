"""The honest control from Python: a plain run of the same length, a row of the compressed run's report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_compress.callbacks import CompressionReport, GradualPruning
from lightning_compress.phase import Phase

from .small import BATCHES, fit, make

PHASE = Phase(0.25, 0.5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CompressionReport:
    """A plain run of four epochs."""
    folder = tmp_path_factory.mktemp("plain")
    report = CompressionReport(folder, show=False)
    fit(folder, make(), report, max_epochs=4)
    return report


def compressed(folder: Path, report: CompressionReport, **options: Any) -> dict[str, Any]:
    fit(folder, make(), GradualPruning(0.5, phase=PHASE), report, **{"max_epochs": 4, **options})
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("form", ["callback", "path"])
def test_a_plain_run_is_a_row_everywhere(form: str, tmp_path: Path, plain: CompressionReport, capsys: Any) -> None:
    path = Path(str(plain.dirpath)) / "report.json"
    before = json.loads(path.read_text())
    report = CompressionReport(tmp_path, control=plain if form == "callback" else path)
    found = compressed(tmp_path, report)
    assert found["control"] == before["compressed"]
    assert found["control"]["metric"] == 4.0  # Small validates the number of epochs that are over
    assert found["steps"] == {"dense": BATCHES, "control": 4 * BATCHES, "compressed": 4 * BATCHES}
    assert not [text for text in found["warnings"] if "control" in text]
    printed = capsys.readouterr().out
    for text in (printed, *((tmp_path / name).read_text() for name in ("report.html", "MODEL_CARD.md"))):
        assert f"dense (step {BATCHES})" in text
        assert "dense trained on" in text


def test_a_control_of_another_length_or_metric_is_warned_of(tmp_path: Path, plain: CompressionReport) -> None:
    with pytest.warns(UserWarning, match="control was trained for 16 steps, and this run for 8"):
        found = compressed(tmp_path / "a", CompressionReport(tmp_path / "a", show=False, control=plain), max_epochs=2)
    assert any("a control is of the same length" in text for text in found["warnings"])
    other = json.loads((Path(str(plain.dirpath)) / "report.json").read_text()) | {"metric": "val_acc"}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    with pytest.warns(UserWarning, match="control is of the metric 'val_acc', and this run of 'val_loss'"):
        found = compressed(tmp_path / "b", CompressionReport(tmp_path / "b", show=False, control=path))
    assert found["control"]["metric"] is None
    assert found["control"]["num_params"] == other["compressed"]["num_params"]


def test_what_is_no_control_is_refused_before_the_run(tmp_path: Path, plain: CompressionReport) -> None:
    pruned = CompressionReport(tmp_path, show=False)
    compressed(tmp_path, pruned)
    for control in (pruned, tmp_path / "report.json"):
        with pytest.raises(
            ValueError, match=r"is of a run that compressed its model. Accepted is the CompressionReport"
        ):
            CompressionReport(control=control)
    with pytest.raises(ValueError, match=r"control has no report: its fit is not over. .* Call its fit first"):
        CompressionReport(control=CompressionReport())
    with pytest.raises(ValueError, match=r"of the metric 'val_loss', and this one's monitor is 'val_acc'"):
        CompressionReport(monitor="val_acc", control=plain)
    (tmp_path / "list.json").write_text("[]")
    for name, why in (("none.json", "FileNotFoundError"), ("list.json", "no attribute 'keys'")):
        with pytest.raises(ValueError, match=rf"control='.*{name}' cannot be read \(.*{why}"):
            CompressionReport(control=str(tmp_path / name))
    with pytest.raises(TypeError, match=r"control=0.97: accepted is the CompressionReport of a plain run"):
        CompressionReport(control=0.97)  # type: ignore[arg-type]


def test_validation_samples_are_those_of_one_validation(tmp_path: Path, plain: CompressionReport) -> None:
    assert plain.report is not None
    assert plain.report["validation_samples"] == 8
