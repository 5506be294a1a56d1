"""Run the notebooks of docs/tutorials anew, each in an empty folder: ``python -m experiments.tutorials``.

A cell that fails ends the command with its error. ``--write`` keeps the new outputs in the notebooks, without what
tells of the machine: what Lightning says of it, paths in front of warnings, and HTML beside the same as text.
Needs the extra ``docs``.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning_compress.files import write_whole

FOLDER = Path(__file__).parents[1] / "docs/tutorials"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
_OF_THE_MACHINE = re.compile(
    r"^(?:(?:GPU available|TPU available|HPU available|💡|Seed set|Loading `|`Trainer\.|`weights_only`"
    r"|/\S+/site-packages/|  \S+\().*\n|/\S+:\d+: )",
    re.MULTILINE,
)
_STYLE = re.compile(r"\x1b\[[\d;]*m")


def executed(name: str) -> Any:
    """The notebook with the outputs of now.

    Raises:
        CellExecutionError: If a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook: Any = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    options: dict[str, Any] = {
        "timeout": 1800,
        "kernel_name": "python3",
        "coalesce_streams": True,
        "record_timing": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, resources={"metadata": {"path": folder}}, **options).execute()
    return notebook


def cleaned(notebook: Any) -> Any:
    """The notebook without what tells of the machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(notebook.cells):
        cell.id = str(i)
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                output.text = _OF_THE_MACHINE.sub("", output.text)
            if "data" in output:
                output.data.pop("text/html", None)
                output.data["text/plain"] = _STYLE.sub("", output.data["text/plain"])
                output.metadata = {}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.text]
    return notebook


def main() -> None:
    """Run, print the seconds, and write where that is asked for."""
    import nbformat

    parser = argparse.ArgumentParser(prog="python -m experiments.tutorials", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(NAMES)}; all without one")
    parser.add_argument("--write", action="store_true", help="keep the new outputs")
    options = parser.parse_args()
    for name in options.names or NAMES:
        start = time.perf_counter()
        notebook = executed(name)
        num = sum(cell.cell_type == "code" for cell in notebook.cells)
        print(f"{name}: {num} cells in {time.perf_counter() - start:.0f} s", flush=True)
        if options.write:
            write_whole(FOLDER / f"{name}.ipynb", nbformat.writes(cleaned(notebook)) + "\n")


if __name__ == "__main__":
    main()
