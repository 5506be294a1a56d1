"""The fuzz of all readers: a little of it, and that it sees what it looks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import readers
from experiments.bench.fuzz import run
from experiments.mutations import FORGERIES, WOUNDS


def test_whatever_is_damaged_is_refused_by_name_or_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    found = run(mutations=300)
    assert found["headline"]["mutations"] == 300
    assert not found["faults"]
    assert {row["reader"] for row in found["rows"]} == set(readers.READERS)
    assert {row["damage"] for row in found["rows"] if row["reader"] == "packed"} == {*WOUNDS, *FORGERIES}
    assert sum(row["refused"] for row in found["rows"]) > 150


def lie(path: Path, model: object = None) -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(3)}


def fail(path: Path, model: object = None) -> Any:
    raise KeyError("bytes")


def waste(path: Path, model: object = None) -> Any:
    kept = torch.ones(2**30, dtype=torch.uint8)
    raise ValueError(f"{path} {len(kept)}")


def die(path: Path, model: object = None) -> Any:
    os.abort()


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (lie, "no checksum was forged"),
        (fail, "KeyError: 'bytes'"),
        (waste, "MiB were taken"),
        (die, "the process died by signal 6"),
    ],
)
def test_a_reader_that_errs_is_seen(reader: Any, said: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(readers, "load_packed", reader)
    found = run(mutations=2, workers=1)
    assert any(said in fault for fault in found["faults"])
    assert found["failed"] == len(found["faults"])
