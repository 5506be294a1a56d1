"""What ``_target_`` names: whether it is there, told without importing it, and which arguments it takes."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.machinery import ModuleSpec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from lightning_compress.checks import first_line

__all__ = ["check_arguments", "check_exists", "closest", "listed", "targets"]

_OFTEN = {"lightning", "lightning_compress", "torch"}
# Where one of these stands in a module, it may hold more names than its text shows.
_BY_OTHER_MEANS = ("import *", "__getattr__", "globals()", "locals()", "vars()", "setattr", "exec(", "sys.modules")


def targets(values: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Where targets are named in a configuration, and what they name.

    Example:
        >>> list(targets({"model": {"_target_": "my.Module", "head": {"_target_": "my.Head"}}}))
        [('model._target_', 'my.Module'), ('model.head._target_', 'my.Head')]
    """
    items: Iterable[tuple[object, object]] = ()
    if isinstance(values, Mapping):
        items = values.items()
    elif isinstance(values, Sequence) and not isinstance(values, str):
        items = enumerate(values)
    for key, value in items:
        at = f"{place}.{key}" if place else str(key)
        if key == "_target_" and isinstance(value, str):
            yield at, value
        else:
            yield from targets(value, at)


def check_exists(place: str, target: str) -> None:
    """Raise where there certainly is no such class; nothing is imported, and what cannot be told passes.

    Args:
        place: Where it is named.
        target: The class, or the function, with its modules.

    Raises:
        ValueError: If a module is not there, or its text names nothing of that name.

    Example:
        >>> check_exists("model._target_", "fractions.Fracton")
        Traceback (most recent call last):
        ValueError: model._target_='fractions.Fracton': fractions has no 'Fracton'. Did you mean 'Fraction'?
    """
    spec: ModuleSpec | None = None
    module = ""
    for name in target.split("."):
        inner = _spec(f"{module}.{name}".lstrip("."), spec)
        if inner is None:
            break
        spec, module = inner, inner.name
    else:
        return
    if not module and name in sys.modules:
        return
    names = _beside(spec)
    if spec is not None:
        held = _held(spec)
        if held is None or name in held:
            return
        names |= held
    fault = f"{module} has no {name!r}." if module else f"there is no module {name!r}."
    fix = " Accepted is a class behind its modules, which are installed or in the current folder. Correct the name."
    raise ValueError(f"{place}={target!r}: {fault}{closest(name, names) or fix}")


def check_arguments(place: str, node: Mapping[str, Any]) -> None:
    """Raise unless a class takes the arguments that a node gives it, and so on in the nodes inside.

    Args:
        place: Where the node stands.
        node: ``_target_`` and arguments.

    Raises:
        ValueError: If the class cannot be imported, or takes no argument of a name.
    """
    from hydra.utils import get_object

    target = node["_target_"]
    if "${" in target:  # what it is, the whole configuration says
        return
    try:
        made = get_object(target)
    except Exception as error:  # whatever an import raises
        raise ValueError(
            f"{place}._target_={target!r} cannot be imported: {first_line(error)}. Accepted is a class."
        ) from error
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):  # written in C
        return
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in node.items():
        if not takes_all and key not in parameters and not (key.startswith("_") and key.endswith("_")):
            raise ValueError(
                f"{place}.{key}: {getattr(made, '__name__', target)} has no such argument. Accepted are "
                f"{listed(parameters)}. Name one.{closest(key, parameters)}"
            )
        if isinstance(value, Mapping) and "_target_" in value:
            check_arguments(f"{place}.{key}", value)


def listed(names: Iterable[object]) -> str:
    """Names in a sentence.

    Example:
        >>> listed(["begin", "end"]), listed([])
        ('begin, end', 'none')
    """
    return ", ".join(map(str, names)) or "none"


def closest(name: str, names: Iterable[object]) -> str:
    """The question whether another name was meant; empty if none is near.

    Example:
        >>> closest("begn", ["begin", "end"]), closest("x", ["begin", "end"])
        (" Did you mean 'begin'?", '')
    """
    found = get_close_matches(name, sorted(map(str, names)), 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _spec(name: str, outer: ModuleSpec | None) -> ModuleSpec | None:
    """What is known of a module without importing the packages around it."""
    if outer is not None and outer.submodule_search_locations is None:
        return None
    path = None if outer is None else list(outer.submodule_search_locations or ())
    specs = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None), None)


def _beside(spec: ModuleSpec | None) -> set[str]:
    """The modules of a package; without one, those of the current folder, and what is named most."""
    folders = ["."] if spec is None else spec.submodule_search_locations
    return {module.name for module in iter_modules(folders or ())} | (_OFTEN if spec is None else set())


def _held(spec: ModuleSpec) -> set[str] | None:
    """The names that a module's text binds; None where it may hold others."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        text = Path(spec.origin).read_text()
        return None if any(words in text for words in _BY_OTHER_MEANS) else set(_bound(ast.parse(text)))
    except (OSError, ValueError, SyntaxError):
        return None


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that are bound below a node, in no function and no class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
            continue
        if isinstance(child, ast.alias):
            yield (child.asname or child.name).partition(".")[0]
        elif isinstance(child, ast.Name):
            yield child.id
        yield from _bound(child)
