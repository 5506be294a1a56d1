"""The count of how the product is built, on a tree that was counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.bench.house import run

ENGINE = '''"""A file of 20 lines."""
from typing import Any


class Layer:
    _masks: Any = None

    def __init__(self, a, b, *, c=1):
        self.a, self.b = a, b
        self._weights = a if c else b

    def same(self, other):
        """Looks into another of its own class."""
        low, high = sorted(other)  # beside code
        return other._weights is self._weights


# a comment with a line of its own
def free(layer, tensor):
    return "# no comment", layer._weights, layer._masks, tensor._version, layer.__dict__
'''


def written(folder: Path) -> Path:
    body = "".join(f"    x = {i}\n" for i in range(41))
    files = {
        "lightning_compress/layers.py": ENGINE,
        "callbacks/pruning.py": f'def long():\n    """Two\n    lines."""\n{body}',
        "callbacks/export.py": f'def short():\n    """Two\n    lines."""\n{body[:300]}',
        "experiments/bench/not_counted.py": "a, b = 1, 2\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    found = run([written(tmp_path)])
    rows = {row["figure"]: row[str(tmp_path)] for row in found["rows"]}
    lines = rows["lines"]
    assert rows["files"] == 3
    assert lines == sum(
        len(p.read_text().splitlines()) for f in ("lightning_compress", "callbacks") for p in (tmp_path / f).iterdir()
    )
    assert (rows["most lines"], rows["the file"]) == (44, "callbacks/pruning.py")
    assert rows["functions over 40 lines, docstring aside"] == 1
    assert (rows["most arguments"], rows["the function"]) == (3, "lightning_compress/layers.py:8 __init__")
    assert rows["Any per 1,000 lines"] == round(2000 / lines, 1)
    assert rows["packed assignments per 1,000 lines"] == round(1000 / lines, 1)
    assert rows["all assignments to several names per 1,000 lines"] == round(2000 / lines, 1)
    assert rows["conditional expressions per 1,000 lines"] == round(1000 / lines, 1)
    assert rows["own-line comments"] == 1
    assert rows["our private attributes reached from outside their class"] == 2
    assert rows["private attributes of other packages"] == 1
    assert found["headline"]["files over 250 lines"] == 0


def test_two_trees_stand_side_by_side(tmp_path: Path) -> None:
    before = written(tmp_path / "before")
    after = written(tmp_path / "after")
    (after / "callbacks" / "pruning.py").write_text("x = 1\n" * 301)
    found = run([before, after])
    row = next(row for row in found["rows"] if row["figure"] == "files over 300 lines")
    assert [row[str(before)], row[str(after)]] == [0, 1]
    assert found["headline"]["files over 300 lines"] == 1


def test_a_folder_without_the_product_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Give a checkout's folder"):
        run([tmp_path])
