"""The files of ``make demo`` in a browser, by onnxruntime-web: their answers beside onnxruntime's, and milliseconds.

Needs ``npm install onnxruntime-web`` and a Chromium, which opens ``experiments/browser.html`` without a screen. One
thread, WebAssembly with SIMD; medians, float and int8 in turn. The images are the first that the demo validates on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lightning_compress.demo.data import MNIST5k

PAGE = Path(__file__).parents[1] / "browser.html"
FILES = ("model_float.onnx", "model.onnx")
_FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
_FLAGS += " --disable-component-update --disable-sync"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where files, onnxruntime-web and the browser are; how many images."""
    parser.add_argument("--folder", type=Path, default=Path("outputs/demo/deploy"), help="of model.onnx and its twin")
    parser.add_argument("--web", type=Path, default=Path("node_modules/onnxruntime-web/dist"))
    parser.add_argument("--chromium", default="chromium", help="the browser's command")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what the page says in it."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        Path(self.directory, "result.part").write_bytes(text)
        Path(self.directory, "result.part").rename(Path(self.directory, "result.json"))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing."""


def in_browser(folder: Path, chromium: str, limit: float = 300) -> dict[str, Any]:
    """What the page in the folder says when the browser has opened it.

    Raises:
        TimeoutError: If it says nothing.
    """
    result = folder / "result.json"
    server = ThreadingHTTPServer(("localhost", 0), partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as user:
        command = [chromium, *_FLAGS.split(), f"--user-data-dir={user}"]
        command += ["--remote-debugging-port=0", f"http://localhost:{server.server_port}/index.html"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + limit
        while not result.exists() and browser.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        browser.terminate()
        browser.wait()
    server.shutdown()
    if not result.exists():
        raise TimeoutError(f"{chromium} opened the page, which said nothing in {limit:.0f} s.")
    return json.loads(result.read_text())


def here(path: Path, images: np.ndarray, rounds: int) -> tuple[np.ndarray, float, float]:
    """Logits in onnxruntime, and milliseconds of one image and of 64."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def milliseconds(batches: list[np.ndarray]) -> float:
        start = time.perf_counter()
        for batch in batches:
            session.run(None, {name: batch})
        return 1000 * (time.perf_counter() - start) / len(batches)

    logits = np.concatenate([session.run(None, {name: image[None]})[0] for image in images])
    ones = [image[None] for image in images[:50]]
    one = median(milliseconds(ones) for _ in range(rounds))
    return logits, one, median(milliseconds([images[:64]]) for _ in range(rounds))


def run(folder: Path, web: Path, chromium: str, images: int, rounds: int) -> dict[str, Any]:
    """Headline: the smallest agreement, and the largest difference as a share of the range of the outputs."""
    missing = [path for path in (web / "ort.wasm.min.mjs", *(folder / name for name in FILES)) if not path.is_file()]
    if missing or shutil.which(chromium) is None:
        raise SystemExit(
            f"{missing[0] if missing else chromium} is not there. Run make demo, npm install onnxruntime-web, and "
            "install a Chromium; --folder, --web and --chromium say where they are."
        )
    data = MNIST5k()
    data.setup("validate")
    pixels = data.val.tensors[0][:images].numpy()
    with tempfile.TemporaryDirectory() as name:
        served = Path(name)
        shutil.copy(PAGE, served / "index.html")
        for path in (*web.glob("ort*.mjs"), *web.glob("*.wasm"), *(folder / name for name in FILES)):
            (served / path.name).symlink_to(path.resolve())
        (served / "images.bin").write_bytes(pixels.tobytes())
        job = {"files": FILES, "shape": pixels.shape, "rounds": rounds}
        (served / "job.json").write_text(json.dumps(job))
        said = in_browser(served, chromium)
    print(f"onnxruntime-web {said['version']}, {said['agent']}")
    rows = []
    for file in FILES:
        logits, one, many = here(folder / file, pixels, rounds)
        there = np.array(said["files"][file]["logits"], dtype=np.float32)
        rows.append(
            {
                "file": file,
                "bytes": (folder / file).stat().st_size,
                "images": len(pixels),
                "agreement": float((there.argmax(1) == logits.argmax(1)).mean()),
                "difference, of range": float(np.abs(there - logits).max() / np.ptp(logits)),
                "ms @1": median(said["files"][file]["one"]),
                "ms @64": median(said["files"][file]["all"]),
                "ms @1, onnxruntime": one,
                "ms @64, onnxruntime": many,
            }
        )
    worst = max(row["difference, of range"] for row in rows)
    return {"headline": {"agreement": min(row["agreement"] for row in rows), "difference": worst}, "rows": rows}
