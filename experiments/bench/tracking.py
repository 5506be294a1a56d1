"""What a W&B server that cannot be reached costs a run: the demo, shortened, against the same run offline.

*refuses* is a port at which nobody listens, *no route* an address that swallows what is sent to it, *hangs* a server
that never answers. Wall-clock of whole processes, interleaved; the median.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from lightning_compress.offline_runs import offline_runs

KINDS = ("offline", "refuses", "no route", "hangs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--epochs and --repeats."""
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)


class Hangs(BaseHTTPRequestHandler):
    """Takes what is posted, and never answers."""

    def do_POST(self) -> None:
        """Nothing."""
        time.sleep(600)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@contextmanager
def server(kind: str) -> Iterator[dict[str, str]]:
    """The environment in which W&B has such a server."""
    if kind == "offline":
        yield {"WANDB_MODE": "offline"}
        return
    with socket.socket() as taken, ThreadingHTTPServer(("127.0.0.1", 0), Hangs) as hangs:
        taken.bind(("127.0.0.1", 0))
        hangs.daemon_threads, hangs.block_on_close = True, False
        threading.Thread(target=hangs.serve_forever, daemon=True).start()
        port = (taken.getsockname() if kind == "refuses" else hangs.server_address)[1]
        host = "192.0.2.1" if kind == "no route" else f"127.0.0.1:{port}"  # RFC 5737: nobody's address
        yield {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://{host}"}
        hangs.shutdown()


def seconds(kind: str, epochs: int) -> float:
    """Of one run, whose numbers are in its folder in the end."""
    options = ["experiment=mnist_prune_int8", "control=false", "logger=wandb", f"trainer.max_epochs={epochs}"]
    with tempfile.TemporaryDirectory() as folder, server(kind) as environment:
        command = [sys.executable, "-m", "lightning_compress.cli", *options, f"hydra.run.dir={folder}"]
        begin = time.perf_counter()
        subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
        taken = time.perf_counter() - begin
        (run,) = offline_runs(Path(folder))
        assert run.summary["compress/final_sparsity"] > 0.8, kind
    return taken


def run(epochs: int = 40, repeats: int = 3) -> dict[str, Any]:
    """Headline: seconds against those of the offline run."""
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            taken[kind].append(seconds(kind, epochs))
    whole = median(taken["offline"])
    rows = [
        {
            "server": kind,
            "seconds": median(values),
            "more": median(a - b for a, b in zip(values, taken["offline"], strict=True)),
            "ratio": median(values) / whole,
            "by run": _short(values),
        }
        for kind, values in taken.items()
    ]
    headline = {f"{row['server']} ratio".replace(" ", "_"): row["ratio"] for row in rows[1:]}
    return {"headline": headline, "rows": rows}


def _short(values: list[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values)
