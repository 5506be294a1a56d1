"""MODEL_CARD.md: what it says of loading the files is run; what it says of the run is looked up."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import save_packed
from lightning_compress.analysis.model_card import how_to_load, write_model_card
from lightning_compress.analysis.origin import origin_of
from lightning_compress.deploy.files import write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.forward import Inputs

from .helpers import noise
from .test_report import make_report

X = noise(1, 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def loaded(path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the lines for a file leave as outputs; they are run beside it."""
    monkeypatch.chdir(path.parent)
    exec(how_to_load(path.name, [name for name in given if name != "model"]), given)
    return given.get("outputs")


def test_an_onnx_file_answers_as_the_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    write_files(FORMATS["onnx"], net(), Inputs((X,), {}), path, (1,))
    (found,) = loaded(path, {"input": X.numpy()}, monkeypatch)
    np.testing.assert_allclose(found, net()(X).detach().numpy(), atol=1e-5)


def test_a_packed_file_is_loaded_as_the_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "packed.safetensors"
    save_packed(net(), path)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    loaded(path, {"model": model}, monkeypatch)
    assert torch.equal(model(X), net()(X))


@pytest.mark.runtimes
@pytest.mark.parametrize("name", ["openvino", "executorch", "litert", "torch"])
def test_files_of_other_runtimes_answer_as_the_card_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = FORMATS[name]
    path = tmp_path / f"model{kind.suffix}"
    write_files(kind, net(), Inputs((X,), {}), path, (1,))
    given: dict[str, Any] = {"x": X.numpy() if name == "openvino" else X}
    found = loaded(path, given, monkeypatch)
    if name == "litert":
        interpreter = given["interpreter"]
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], X.numpy())
        interpreter.invoke()
        found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    answer = found if name in ("litert", "torch") else found[0]
    np.testing.assert_allclose(np.asarray(answer), net()(X).detach().numpy(), atol=1e-4)


def test_the_card_says_what_it_is_of_what_it_is_worth_and_what_to_know(tmp_path: Path) -> None:
    missed = {"callback": "GradualPruning", "target": "sparsity", "asked": 0.95, "reached": 0.9, "missed": True}
    artifact = make_report()["artifacts"][0] | {"path": str(tmp_path / "deploy" / "model.onnx"), "inputs": ["pixels"]}
    report = make_report(
        artifacts=[artifact],
        targets=[missed | {"because": "the run ended"}],
        warnings=["model.onnx is slow"],
        origin=origin_of(net()),
    )
    report["packed"]["path"] = "/elsewhere/packed.safetensors"
    path = tmp_path / "MODEL_CARD.md"
    write_model_card(report, path)
    text = path.read_text()
    assert text.startswith("# Sequential, compressed")
    assert re.search(r"- date: \d{4}-\d\d-\d\d \d\d:\d\d UTC", text)
    assert f"torch {version('torch')}" in text
    assert "### deploy/model.onnx" in text
    assert "session.run(None, {'pixels': pixels})" in text
    assert "load_packed('/elsewhere/packed.safetensors', model)" in text
    assert "- GradualPruning: target not reached: asked sparsity 0.95, reached 0.9, because the run ended." in text
    assert "- model.onnx is slow" in text
    row = next(line for line in text.splitlines() if line.startswith("| model.onnx |"))
    assert "0.9740" in row
    assert text.index("# Sequential") < text.index("| sparsity | 0.95 | 0.9 | missed | GradualPruning |")
    assert text.index("missed | Grad") < text.index("- model: ")
    assert "| batch 1 | 0.25 (0.24-0.27) | 1.5 (1.4-1.6) |" in text
    assert "- zstd: that file after zstd" in text


def test_origin_names_a_commit_only_inside_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    found = origin_of(net())
    assert found["seed"] == "7"
    assert "commit" not in found
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert "commit" not in origin_of(net())
