"""The behaviour matrix as a table for each method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Key = tuple[str, str, str]  # method, module, property


def draw(
    cells: dict[Key, str], methods: Iterable[str], modules: Iterable[str], properties: Iterable[str]
) -> Iterator[str]:
    """A line for each module; "-" stands for a cell that was not run.

    A table has the columns and rows that have a cell in any table, so that all tables look alike.
    """
    columns = [key for key in properties if any(key == cell[2] for cell in cells)]
    for method in methods:
        rows = [name for name in modules if any((method, name) == cell[:2] for cell in cells)]
        if not rows:
            continue
        texts = {(name, key): cells.get((method, name, key), "-") for name in rows for key in columns}
        widths = {key: 2 + max(len(key), *(len(texts[name, key]) for name in rows)) for key in columns}
        yield f"{method:20}" + "".join(f"{key:>{widths[key]}}" for key in columns)
        for name in rows:
            yield f"  {name:18}" + "".join(f"{texts[name, key]:>{widths[key]}}" for key in columns)
