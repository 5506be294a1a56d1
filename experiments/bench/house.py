"""How the product's code is built, counted: sizes, arguments, density, comments, private attributes.

    python -m experiments.bench house
    git worktree add ../before COMMIT && python -m experiments.bench house ../before .

Counted over ``lightning_compress/`` and ``callbacks/`` of each tree, by its syntax alone, so that a tree need not be
installed. Lines are all lines of a file; "per 1,000" is per 1,000 of them.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_FOLDERS = ("lightning_compress", "callbacks")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A file: its path in the tree, its text and its syntax."""

    path: str
    text: str
    syntax: ast.Module

    @property
    def num_lines(self) -> int:
        """All lines, blank ones too."""
        return len(self.text.splitlines())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which trees to count."""
    parser.add_argument("trees", type=Path, nargs="*", default=[Path()], help="folders of a checkout; this one without")


def run(trees: list[Path]) -> dict[str, Any]:
    """A row per figure, a column per tree; the headline is that of the last one."""
    columns = {str(tree): figures(sources(tree)) for tree in trees}
    last = columns[str(trees[-1])]
    rows = [{"figure": name} | {tree: found[name] for tree, found in columns.items()} for name in last]
    return {"headline": {name: value for name, value in last.items() if not isinstance(value, str)}, "rows": rows}


def sources(tree: Path) -> list[Source]:
    """The product's files.

    Raises:
        ValueError: If the tree has none.
    """
    paths = sorted(path for folder in _FOLDERS for path in (tree / folder).rglob("*.py"))
    if not paths:
        raise ValueError(
            f"trees={str(tree)!r} holds no lightning_compress/ with Python files. Give a checkout's folder."
        )
    texts = [path.read_text() for path in paths]
    return [Source(str(p.relative_to(tree)), text, ast.parse(text)) for p, text in zip(paths, texts, strict=True)]


def figures(files: list[Source]) -> dict[str, Any]:
    """Every figure by its name."""
    num_lines = sum(file.num_lines for file in files)
    functions = [found for file in files for found in _functions(file)]
    longest = max(files, key=lambda file: file.num_lines)
    widest = max(functions, key=lambda found: _num_arguments(found[1]))
    ours, others = _reached(files)

    def per_thousand(is_one: Callable[[ast.AST], bool]) -> float:
        count = sum(is_one(node) for file in files for node in ast.walk(file.syntax))
        return round(1000 * count / num_lines, 1)

    return {
        "files": len(files),
        "lines": num_lines,
        "files over 250 lines": sum(file.num_lines > 250 for file in files),
        "files over 300 lines": sum(file.num_lines > 300 for file in files),
        "most lines": longest.num_lines,
        "the file": longest.path,
        "functions over 40 lines, docstring aside": sum(_num_lines(function) > 40 for _, function in functions),
        "most arguments": _num_arguments(widest[1]),
        "the function": widest[0],
        "Any per 1,000 lines": per_thousand(_is_any),
        "packed assignments per 1,000 lines": per_thousand(_is_packed),
        "all assignments to several names per 1,000 lines": per_thousand(_is_to_several),
        "conditional expressions per 1,000 lines": per_thousand(partial(_is_a, ast.IfExp)),
        "own-line comments": sum(_num_comments(file.text) for file in files),
        "our private attributes reached from outside their class": ours,
        "private attributes of other packages": others,
    }


def _functions(file: Source) -> Iterator[tuple[str, _Function]]:
    """Functions and methods, with where they stand."""
    for node in ast.walk(file.syntax):
        if isinstance(node, _Function):
            yield f"{file.path}:{node.lineno} {node.name}", node


def _num_lines(function: _Function) -> int:
    whole = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is None:
        return whole
    return whole - ((first.end_lineno or first.lineno) - first.lineno + 1)


def _num_arguments(function: _Function) -> int:
    """All that a caller can give; self and cls are not."""
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    return sum(arg.arg not in ("self", "cls") for arg in named)


def _is_a(kind: type[ast.AST], node: ast.AST) -> bool:
    return isinstance(node, kind)


def _is_any(node: ast.AST) -> bool:
    """Whether it is ``Any``, used or imported."""
    return (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.alias) and node.name == "Any")


def _is_to_several(node: ast.AST) -> bool:
    """Whether several names stand on the left of one ``=``."""
    return isinstance(node, ast.Assign) and any(isinstance(target, ast.Tuple) for target in node.targets)


def _is_packed(node: ast.AST) -> bool:
    """Whether several assignments stand in one: as many values on the right as names on the left."""
    return _is_to_several(node) and isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)


def _num_comments(text: str) -> int:
    """Comments that have a line of their own."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and token.line.lstrip().startswith("#") for token in tokens)


def _reached(files: list[Source]) -> tuple[int, int]:
    """How often code reaches for a private attribute from outside its class: one of ours, one of another package's."""
    classes = [node for file in files for node in ast.walk(file.syntax) if isinstance(node, ast.ClassDef)]
    defined = {id(cls): _private(cls) for cls in classes}
    all_ours = {name for names in defined.values() for name in names}
    ours = others = 0
    for file in files:
        inside: dict[int, set[str]] = {}
        for cls in ast.walk(file.syntax):
            if isinstance(cls, ast.ClassDef):
                for node in ast.walk(cls):
                    inside.setdefault(id(node), set()).update(defined[id(cls)])
        for node in ast.walk(file.syntax):
            if not isinstance(node, ast.Attribute) or not _is_private(node.attr) or _is_own(node.value):
                continue
            if node.attr not in all_ours:
                others += 1
            elif node.attr not in inside.get(id(node), ()):
                ours += 1
    return ours, others


def _private(cls: ast.ClassDef) -> set[str]:
    """Private names that a class gives to itself: methods, fields, attributes that it sets."""
    names: set[str] = set()
    for node in cls.body:
        if isinstance(node, _Function):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    for inner in ast.walk(cls):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _is_own(inner.value):
            names.add(inner.attr)
    return {name for name in names if _is_private(name)}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _is_own(value: ast.expr) -> bool:
    """Whether an attribute's owner is the object itself, its class or its parent."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")
