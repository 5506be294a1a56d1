"""What a logger refuses costs itself alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import WandbLogger
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
