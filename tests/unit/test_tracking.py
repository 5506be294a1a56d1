"""Weights & Biases offline: real runs, written and read back."""

from __future__ import annotations

import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from lightning_compress.offline_runs import offline_runs
from lightning_compress.tracking import (
    OfflineRun,
    _why_offline,
    define_metric,
    finish_run,
    log_files,
    log_histograms,
    read_offline_run,
    wandb_logger,
)

LONG = "x" * 100_000  # longer than three blocks of the file's format
METRICS = [{"compress/sparsity": step / 4, "loss": 1.0 / (step + 1), "epoch": step} for step in range(4)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for key in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(key, str(folder))
        settings = wandb.Settings(silent=True, console="off")
        run = wandb.init(
            mode="offline",
            dir=folder,
            project="p",
            name="sparsity=0.9",
            group="sweep-1",
            config={"lr": 0.1, "nested": {"bits": [8, 4]}, "long": LONG},
            settings=settings,
        )
        for step, metrics in enumerate(METRICS):
            run.log(metrics, step=step)
        run.log({"compress/weights": wandb.Image(np.zeros((4, 5, 3), np.uint8))}, step=len(METRICS))
        run.config.update({"late": True})
        run.finish()
        wandb.teardown()  # waits until what writes the file has ended
    (path,) = folder.rglob("*.wandb")
    return path


@pytest.fixture(scope="module")
def run(written: Path) -> OfflineRun:
    return read_offline_run(written)


def test_name_group_and_id_come_back(run: OfflineRun, written: Path) -> None:
    assert (run.name, run.group) == ("sparsity=0.9", "sweep-1")
    assert written.name == f"run-{run.run_id}.wandb"


def test_the_configuration_comes_back_whatever_its_length(run: OfflineRun) -> None:
    found = {key: run.config[key] for key in ("lr", "nested", "long", "late")}
    assert found == {"lr": 0.1, "nested": {"bits": [8, 4]}, "long": LONG, "late": True}


def test_every_logged_step_comes_back(run: OfflineRun) -> None:
    assert [{key: row[key] for key in METRICS[0]} for row in run.history[:4]] == METRICS
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3, 4]


def test_the_summary_holds_the_last_values_without_internals(run: OfflineRun) -> None:
    assert {key: run.summary[key] for key in METRICS[-1]} == METRICS[-1]
    assert run.summary["compress/weights._type"] == "image-file"
    assert "_timestamp" in run.history[0]


def test_pictures_are_among_the_files(run: OfflineRun, written: Path) -> None:
    (image,) = (name for name in run.files if name.endswith(".png"))
    assert image.startswith("media/images/compress/weights")
    assert (written.parent / "files" / image).read_bytes().startswith(b"\x89PNG")


def test_the_folder_of_a_run_is_as_good_as_its_file(run: OfflineRun, written: Path) -> None:
    assert read_offline_run(written.parent) == read_offline_run(str(written)) == run


@pytest.mark.parametrize("num_bytes", [3, 40, 700])
def test_a_file_cut_short_by_a_killed_run_gives_what_is_whole(
    run: OfflineRun, written: Path, tmp_path: Path, num_bytes: int
) -> None:
    path = tmp_path / written.name
    path.write_bytes(written.read_bytes()[:-num_bytes])
    os.utime(path, (0, 0))
    found = read_offline_run(path)
    assert (found.run_id, found.config["lr"]) == (run.run_id, 0.1)
    assert found.history[:4] == run.history[:4]


def test_a_file_that_is_still_being_written_is_waited_for(run: OfflineRun, written: Path, tmp_path: Path) -> None:
    """W&B's finish() returns up to some milliseconds before the file is whole."""
    path, whole = tmp_path / written.name, written.read_bytes()
    path.write_bytes(whole[:7])
    os.utime(path, (time.time() - 5, time.time() - 5))  # opened when the run began
    later = threading.Timer(3, path.write_bytes, [whole])
    later.start()
    found = read_offline_run(path)
    later.join()
    assert found == run


def test_a_run_is_ended_when_its_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where W&B is slow, and where the file was last written long ago."""
    finish = wandb.finish
    run = wandb_logger(tmp_path, project="p").experiment
    (path,) = tmp_path.rglob("*.wandb")
    run.log({"loss": 1.0})
    os.utime(path, (0, 0))
    later = threading.Timer(0.5, finish)
    later.start()
    monkeypatch.setattr(wandb, "finish", lambda: None)
    finish_run()
    later.join()
    os.utime(path, (0, 0))  # not waited for
    assert read_offline_run(path).summary["loss"] == 1.0


def test_a_killed_run_of_a_machine_whose_clock_is_ahead_is_read_soon(written: Path, tmp_path: Path) -> None:
    path = tmp_path / written.name
    path.write_bytes(written.read_bytes()[:7])
    os.utime(path, (2**32, 2**32))
    assert read_offline_run(path) == OfflineRun()


HEADER = b":W&B\xe1\xbe\0"


def chunk(kind: int, data: bytes) -> bytes:
    checksum = zlib.crc32(bytes([kind]) + data)
    return checksum.to_bytes(4, "little") + len(data).to_bytes(2, "little") + bytes([kind]) + data


@pytest.mark.parametrize("left", range(8))
def test_a_record_at_the_end_of_a_block_leaves_the_next_one_readable(left: int, tmp_path: Path) -> None:
    """A block holds 32 KiB; less than the 7 bytes of a chunk's head at its end are filled with zeros."""
    first, second = wandb_internal_pb2.Record(), wandb_internal_pb2.Record()
    first.run.run_id = "x" * (32768 - 7 - 7 - left)
    first.run.run_id = first.run.run_id[: -(len(first.SerializeToString()) - len(first.run.run_id))]
    assert len(first.SerializeToString()) == 32768 - 7 - 7 - left
    second.history.item.add(key="loss", value_json="0.5")
    end = {0: b"", 7: chunk(2, b"")}.get(left, bytes(left))
    path = tmp_path / "run-x.wandb"
    path.write_bytes(
        HEADER + chunk(1, first.SerializeToString()) + end + chunk(4 if left == 7 else 1, second.SerializeToString())
    )
    os.utime(path, (0, 0))
    run = read_offline_run(path)
    assert run.run_id == first.run.run_id
    assert run.history == [{"loss": 0.5}]


def test_a_damaged_byte_is_a_value_error_with_the_files_name(written: Path, tmp_path: Path) -> None:
    """Never other numbers; only W&B's version, which this reader does not ask for, goes unnoticed."""
    whole, path = written.read_bytes(), tmp_path / "run-x.wandb"
    for place in [*range(0, 200, 7), len(whole) // 2, len(whole) - 20]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        os.utime(path, (0, 0))
        with pytest.raises(ValueError, match=r"run-x.wandb' cannot be read as an offline run"):
            read_offline_run(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "run-x.wandb", tmp_path):
        with pytest.raises(FileNotFoundError):
            read_offline_run(path)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home without any key, and no W&B settings in the environment or of a run before."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_SILENT"):
        monkeypatch.setenv(key, "")  # so that what is set in the test does not outlive it
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


def is_offline(logger: Any) -> bool:
    return logger._offline


@pytest.mark.parametrize(("key", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_where_tracking_is_disabled_nothing_is_written(
    key: str, value: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(key, value)
    logger = wandb_logger(home / "logs", project="p")
    logger.log_metrics({"loss": 0.25}, step=3)
    logger.experiment.finish()
    assert not list(home.rglob("*.wandb"))


def test_without_a_key_a_logger_is_offline_and_writes_a_run_that_reads_back(home: Path) -> None:
    logger = wandb_logger(home / "logs", project="p", name="n", group="g")
    assert is_offline(logger)
    logger.log_hyperparams({"sparsity": 0.5})
    logger.log_metrics({"loss": 0.25}, step=3)
    logger.experiment.finish()
    (path,) = (home / "logs").rglob("*.wandb")
    run = read_offline_run(path)
    assert (run.name, run.group, run.config["sparsity"]) == ("n", "g", 0.5)
    assert run.summary["loss"] == 0.25


class Server(ThreadingHTTPServer):
    """Answers everything with a status; what asks by POST waits, if it is to hang."""

    def __init__(self, status: int = 200, hangs: bool = False) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()

            def do_POST(self) -> None:
                done.wait(60 if hangs else 0)
                self.do_GET()

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.done = done = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_close(self) -> None:
        self.done.set()
        self.shutdown()
        super().server_close()


@pytest.fixture
def serve(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a server that W&B is to take."""
    servers = []

    def make(**options: Any) -> str:
        servers.append(Server(**options))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{servers[-1].server_address[1]}")
        return "127.0.0.1"

    yield make
    for server in servers:
        server.server_close()


def test_a_key_in_the_environment_means_online_unless_offline_is_asked_for(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    assert _why_offline() == "no key is set"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert _why_offline() is None
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert _why_offline() == "WANDB_MODE is offline"


@pytest.mark.parametrize(("machine", "online"), [("127.0.0.1", True), ("elsewhere.org", False)])
def test_a_key_in_netrc_counts_for_its_own_host(home: Path, serve: Any, machine: str, online: bool) -> None:
    serve(status=404)  # an answer, too
    (home / ".netrc").write_text(f"machine {machine}\n  login user\n  password {'0' * 40}\n")
    (home / ".netrc").chmod(0o600)
    assert (_why_offline() is None) is online


def assert_a_run_is_logged_offline(home: Path, seconds: float) -> None:
    begin = time.perf_counter()
    logger = wandb_logger(home / "logs", project="p")
    assert is_offline(logger)
    logger.log_metrics({"loss": 0.25}, step=3)
    logger.experiment.finish()
    assert time.perf_counter() - begin < seconds
    (path,) = (home / "logs").rglob("offline-run-*/*.wandb")
    assert read_offline_run(path).summary["loss"] == 0.25


def test_a_server_that_cannot_be_reached_costs_no_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.socket() as taken:  # a port at which nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert_a_run_is_logged_offline(home, 60)  # W&B alone waits for 90 s


@pytest.mark.parametrize("options", [{"status": 404}, {"hangs": True}], ids=["refuses", "hangs"])
def test_a_server_that_refuses_or_hangs_costs_little_time_and_no_number(
    home: Path, serve: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(**options)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert_a_run_is_logged_offline(home, 60)


def test_files_and_the_best_value_come_back(home: Path) -> None:
    file = home / "model.onnx"
    file.write_bytes(b"onnx")
    logger = wandb_logger(home / "logs", project="p")
    define_metric(logger.experiment, "val_acc", True)
    for step, value in enumerate((0.5, 0.9, 0.7)):
        logger.log_metrics({"val_acc": value}, step=step)
    packed = home / "packed.safetensors"
    packed.write_bytes(b"packed")
    log_histograms(logger.experiment, [0.0, 1.0, 2.0], {"before": [3.0, 4.0], "after": []})
    files = [{"format": "onnx", "path": str(file), "bytes": 4, "agreement": 1.0}]
    log_files(logger.experiment, files, {"path": str(packed), "bytes": 6})
    run_id = logger.experiment.id
    logger.experiment.finish()
    (path,) = (home / "logs").rglob("*.wandb")
    found = read_offline_run(path)
    assert found.artifacts == {
        f"checkpoint-{run_id}": {"bytes": 6},
        f"model-{run_id}-onnx": {"format": "onnx", "bytes": 4, "agreement": 1.0, "made_from": f"checkpoint-{run_id}"},
    }
    (histogram,) = [row for row in found.history if any("weights_before" in key for key in row)]
    assert not any("weights_after" in key for row in found.history for key in row)
    assert [3, 4] in histogram.values() or histogram["compress/weights_before"]["values"] == [3, 4]
    assert found.summary["val_acc"] == {"max": 0.9, "last": 0.7}


def test_runs_below_a_folder_come_back_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", "")
    settings = wandb.Settings(silent=True, console="off")
    for name in ("1 sparsity=0.9", "0 sparsity=0.5"):
        wandb.init(mode="offline", dir=tmp_path / name[0], project="p", name=name, settings=settings).finish()
    assert [run.name for run in offline_runs(tmp_path)] == ["0 sparsity=0.5", "1 sparsity=0.9"]
    assert offline_runs(tmp_path / "none") == []
