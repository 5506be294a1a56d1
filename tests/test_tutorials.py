"""The notebooks of docs/tutorials: as they ran, without what tells of the machine; make docs-test runs them anew."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from experiments.tutorials import FOLDER, NAMES


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def test_there_are_three_and_each_is_small() -> None:
    assert len(NAMES) == 3
    assert all(path.stat().st_size < 100_000 for path in FOLDER.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_ran_once_and_in_order(name: str) -> None:
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert len(code) < len(cells(name))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_no_output_tells_of_the_machine(name: str) -> None:
    for cell in cells(name):
        for output in cell.get("outputs", []):
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            assert not re.search(r"(^|\s)/\w|GPU|\x1b|\d{4}-\d\d-\d\d", text), text
            assert output.get("data", {}).keys() <= {"text/plain", "image/png"}
