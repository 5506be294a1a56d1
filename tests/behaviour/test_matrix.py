"""Methods x modules x properties; conftest prints what became of each cell, a table for each method.

By default the matrix is thinned, ``pytest --full`` runs every cell: docs/decisions/0013.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..harness import assert_fails_alike
from .methods import METHODS
from .properties import PROPERTIES, Cell, Runs, pairs, thinned, whole_matrix


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One process for all cells of a module, which share their runs; one for all that take two processes each."""
    if "cell" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full")
    cells = whole_matrix(full)
    groups = {cell: "ddp" if cell.property == "ddp" else cell.module for cell in cells}
    params = [
        pytest.param(
            cell, id=f"{cell.property}-{cell.method}-{cell.module}", marks=pytest.mark.xdist_group(groups[cell])
        )
        for cell in (cells if full else thinned(cells))
    ]
    metafunc.parametrize("cell", params)


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cells = [
        item.callspec.params["cell"] for item in request.session.items if "cell" in getattr(item, "fixturenames", ())
    ]
    return Runs(tmp_path_factory.mktemp, [cell for cell in cells if cell.property == "ddp"])


def test_matrix(cell: Cell, runs: Runs, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """A method keeps a property of a module, unless the module does not have it without any callback either."""
    record_property("cell", (cell.method, cell.module, cell.property))
    (tmp_path / "plain").mkdir()
    hold = PROPERTIES[cell.property]
    try:
        hold(cell, runs, tmp_path)
    except Exception as error:
        plain = Cell("plain", cell.module, cell.property, cell.full)
        assert_fails_alike(error, lambda: hold(plain, runs, tmp_path / "plain"))


@pytest.mark.parametrize("key", PROPERTIES)
def test_a_plain_mlp_has_every_property(key: str, runs: Runs, tmp_path: Path) -> None:
    """On any CPU; else a fault of the properties themselves would excuse all cells."""
    PROPERTIES[key](Cell("plain", "mlp", key), runs, tmp_path)


def test_a_thinned_run_has_every_pair() -> None:
    cells = whole_matrix(full=False)
    chosen = thinned(cells)
    assert {pair for cell in chosen for pair in pairs(cell)} == {pair for cell in cells for pair in pairs(cell)}
    assert chosen == thinned(cells)
    assert len(set(chosen)) == len(chosen) < len(cells) / 5


def test_a_thinned_run_resumes_from_every_checkpoint_of_every_method() -> None:
    resumed = [cell for cell in thinned(whole_matrix(full=False)) if cell.property == "resume"]
    for method, how in METHODS.items():
        found = {batches for cell in resumed if cell.method == method for batches in cell.some(how.saved)}
        assert found == set(how.saved), method
