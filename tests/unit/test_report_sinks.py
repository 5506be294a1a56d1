"""What a logger refuses costs itself alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from lightning_compress.analysis.history import History
from lightning_compress.callbacks.report_sinks import send
from lightning_compress.tracking import finish_run, read_offline_run, wandb_logger

REPORT: dict[str, Any] = {
    "metric": "val_acc",
    "dense": None,
    "control": None,
    "compressed": {"metric": 0.5, "num_params": 4, "num_nonzero": 2, "sparsity": 0.5},
    "layers": [],
    "packed": None,
    "latency_ms_pytorch": {},
    "phases": ["dense", "prune"],
}


ARTIFACT: dict[str, Any] = {
    "latency_ms": {},
    "latency_ms_float": {},
    "metric": 0.5,
    "bytes_zstd": 9,
    "runtime": "onnxruntime",
}


def test_pictures_that_are_refused_cost_neither_tables_nor_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, key: str, images: object) -> None:
        raise FileNotFoundError("no folder for pictures")

    monkeypatch.setattr(WandbLogger, "log_image", refuse)
    file = tmp_path / "model.onnx"
    file.write_bytes(np.arange(9).tobytes())
    report = REPORT | {"artifacts": [{"format": "onnx", "path": str(file), "bytes": 72} | ARTIFACT]}
    logger: Any = wandb_logger(tmp_path, project="p")
    run_id = logger.experiment.id
    with pytest.warns(UserWarning, match=r"did not take the report's picture 'weights': FileNotFoundError: no folder"):
        send(logger, report, History(), {"weights": Figure()}, 3)  # type: ignore[arg-type]
    finish_run()
    (path,) = tmp_path.rglob("*.wandb")
    found = read_offline_run(path)
    assert found.artifacts[f"model-{run_id}-onnx"]["bytes"] == 72
    assert found.summary["compress/final_sparsity"] == 0.5
    assert any("compress/report" in name for name in found.files)


def test_no_key_is_both_a_curve_and_a_picture_and_the_file_stands_in_the_summary(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(np.arange(9).tobytes())
    artifact = {"format": "onnx", "path": str(file), "bytes": 72} | ARTIFACT
    artifact |= {"latency_ms": {"1": 0.25}, "latency_ms_float": {"1": 0.5}, "latency_ms_quartiles": {"1": [0.2, 0.3]}}
    logger: Any = wandb_logger(tmp_path, project="p")
    for step in range(3):
        logger.log_metrics({"compress/sparsity": step / 4, "compress/bytes": 100.0}, step=step)
    pictures: Any = {name: Figure() for name in ("metric", "sparsity", "bits", "weights")}
    send(logger, REPORT | {"artifacts": [artifact]}, History(), pictures, 3)  # type: ignore[arg-type]
    finish_run()
    (path,) = tmp_path.rglob("*.wandb")
    found = read_offline_run(path)
    kinds: dict[str, set[type]] = {}
    for row in found.history:
        for key, value in row.items():
            kinds.setdefault(key.partition("._type")[0], set()).add(dict if "._type" in key else type(value))
    numbers = {key for key, types in kinds.items() if types <= {int, float} and key.startswith("compress/")}
    assert {"compress/sparsity", "compress/file_bytes"} <= numbers
    pictures = [Path(name).name for name in found.files if "/images/" in name]
    assert sorted({name.rpartition("_")[0].rpartition("_")[0] for name in pictures}) == [
        *("bits", "metric", "sparsity_by_layer", "weights"),
    ]
    (table,) = tmp_path.rglob("files/media/table/compress/report*.json")
    rows = json.loads(table.read_text())["data"]
    assert rows[-1][:3] == ["model.onnx", 0.5, 0.5]
    assert rows[-1][5:7] == [72, 9]  # numbers, and not their pictures as text
    (table,) = tmp_path.rglob("files/media/table/compress/latency*.json")
    assert json.loads(table.read_text())["data"] == [
        ["onnxruntime", "model.onnx", 1, 0.25, 0.2, 0.3, 0.5, None, None],
    ]
    assert found.summary["compress/phases"] == "0 dense, 1 prune"
    expected = {"file_metric": 0.5, "file_bytes": 72, "file_bytes_zstd": 9, "file_ms_batch1": 0.25}
    assert {key: found.summary[f"compress/{key}"] for key in expected} == expected


def test_tensorboard_gets_the_table_as_text_and_a_metric_for_its_hyper_parameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"rate": 0.1})
    report = REPORT | {"dense": REPORT["compressed"] | {"num_params": 9}, "artifacts": []}
    send(logger, report, History(), {"sparsity": Figure()}, 3)  # type: ignore[arg-type]
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [event.value for event in events.Scalars("hp_metric")][-1] == 0.5
    texts = {
        tag.partition("/text_summary")[0]: events.Tensors(tag)[0].tensor_proto.string_val[0]
        for tag in events.Tags()["tensors"]
        if tag.startswith("compress/")
    }
    assert b"| dense |" in texts["compress/report"]
    assert b"- zstd: that file after zstd" in texts["compress/report"]
    assert texts["compress/phases"] == b"0 dense, 1 prune"
    assert events.Tags()["images"] == ["compress/sparsity"]
