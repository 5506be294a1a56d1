"""How the command refuses a wrong call: in words, with an exit status, and with nothing left behind."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from lightning_compress.targets import closest
from lightning_compress.usage import SHORT, TASKS

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # of Python 3.11

__all__ = ["clear", "is_worded", "misspelt", "own", "refuse"]

# An error of these kinds is a mistake in code, and not in a call.
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError)
_BETWEEN = ("contextlib", "functools", "importlib")
# What these raise is worded for who called. An error that went through any other code is shown with its places.
_WORDED = ("hydra", "lightning", "lightning_compress", "omegaconf", "pytorch_lightning", *_BETWEEN)


def refuse(error: Exception) -> NoReturn:
    """End the command with the words of an error; with ``HYDRA_FULL_ERROR=1``, with its traceback."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    else:
        print(f"{own(error)}\nHYDRA_FULL_ERROR=1 shows where this was raised.", file=sys.stderr)
    sys.exit(1)


def own(error: Exception) -> Exception:
    """The error inside of those that Hydra puts around what a class raises."""
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def is_worded(error: Exception) -> bool:
    """Whether the words of an error say all: it went through our code, Hydra's and Lightning's alone."""
    said = own(error)
    if isinstance(said, _BUGS) or type(said) is RuntimeError:
        return False
    link: BaseException | None = error
    while link is not None:
        if not _is_ours(link.__traceback__):
            return False
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return True


def misspelt(words: Sequence[str]) -> str:
    """The question whether other names were meant, of a call that Hydra refused; empty if none is near.

    Example:
        >>> misspelt(["trainer.max_epoch=3"]), misspelt(["compresson=int8"]), misspelt(["seed=3"])
        ("Did you mean 'trainer.max_epochs'?", "Did you mean 'compression'?", '')
        >>> misspelt(["experiment=claims/gradul"]), misspelt(["experiment=claims/gradual"])
        ("Did you mean 'experiment=claims/gradual'?", '')
    """
    for word in words:
        if word.isidentifier() and (near := closest(word, [*SHORT, *TASKS])):
            return near.strip() if near.split("'")[1] in SHORT else near.replace("'", "'task=", 1).strip()
    try:
        overrides = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    except Exception:  # no override of Hydra's grammar; Hydra has said so
        return ""
    groups = {path.name for path in files("lightning_compress.conf").iterdir() if path.is_dir()}
    chosen = [o for o in overrides if o.key_or_group in groups and not o.is_sweep_override()]
    asked = [_chosen(o.key_or_group, o.value()) for o in chosen]
    cfg = _composed([str(o.input_line) for o in chosen])
    asked += [_meant(cfg, o.key_or_group, groups) for o in overrides if not (o.is_add() or o.is_delete())]
    return " ".join(question for question in asked if question)


def clear(folder: Path) -> None:
    """Remove the folder of a run that left nothing but what Hydra wrote before it; and the empty ones around it."""
    before = {*folder.glob(".hydra/*.yaml"), *folder.glob("lightning-compress.log")}
    if {path for path in folder.rglob("*") if path.is_file()} != before:
        return
    with suppress(OSError):  # of a folder that is not empty
        for path in before:
            path.unlink()
        (folder / ".hydra").rmdir()
        while Path.cwd() in folder.parents:
            folder.rmdir()
            folder = folder.parent


def _is_ours(place: TracebackType | None) -> bool:
    """Whether a traceback goes through the packages alone whose errors are worded."""
    while place is not None:
        name = place.tb_frame.f_globals.get("__name__", "")
        if name != "__main__" and name.partition(".")[0] not in _WORDED:
            return False
        place = place.tb_next
    return True


def _composed(overrides: list[str]) -> dict[str, Any]:
    """The configuration of the groups that were chosen; of none, where one is not there."""
    for chosen in (overrides, []):
        GlobalHydra.instance().clear()
        with suppress(Exception), initialize_config_module("lightning_compress.conf", version_base="1.3"):
            plain: Any = OmegaConf.to_container(compose("config", chosen, return_hydra_config=True))
            return plain
    raise AssertionError("the configuration of the package does not compose")


def _chosen(group: str, option: object) -> str:
    """The question of one choice: whether it was to be another of its group."""
    options = set(_options(files("lightning_compress.conf").joinpath(group)))
    if not isinstance(option, str) or option in options:
        return ""
    return closest(option, options).replace("'", f"'{group}=", 1).strip()


def _options(folder: Traversable, before: str = "") -> Iterator[str]:
    """The names that a group offers; those in a folder of it behind the folder's."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _options(path, f"{before}{path.name}/")
        else:
            yield before + path.name.removesuffix(".yaml")


def _meant(cfg: dict[str, Any], address: str, groups: set[str]) -> str:
    """The question of one address: whether its first unknown name was to be another."""
    node: Any = {**dict.fromkeys(groups), **cfg}
    known = ""
    for name in address.replace("/", ".").partition("@")[0].split("."):
        if not isinstance(node, dict):
            return ""
        if name not in node:
            return closest(name, node).replace("'", f"'{known}", 1).strip()
        known += f"{name}."
        node = node[name]
    return ""
