"""Recipes: callbacks in a YAML file, the same for Hydra, for LightningCLI, for a script and for LIGHTNING_COMPRESS.

A recipe maps names to callbacks, each with its class as ``_target_`` and its arguments::

    prune:
      _target_: lightning_compress.callbacks.GradualPruning
      sparsity: 0.8
    report:
      _target_: lightning_compress.callbacks.CompressionReport
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_compress.checks import check_list, check_path, first_line
from lightning_compress.targets import check_arguments, closest, listed

if TYPE_CHECKING:
    from lightning.pytorch import Callback

__all__ = ["read_recipe", "recipe", "recipes", "split_words"]

_ENDINGS = (".yaml", ".yml")
_PREFIXES = ("compression.", "callbacks.")  # of the addresses in a Hydra application


def recipes() -> list[str]:
    """The names of the recipes that come with the package.

    Example:
        >>> [name for name in recipes() if "int8" in name]
        ['int8', 'prune_int8']
    """
    paths = files("lightning_compress.conf").joinpath("compression").iterdir()
    names = [path.name.removesuffix(".yaml") for path in paths if path.name.endswith(".yaml")]
    return sorted(name for name in names if name != "none")


def recipe(name: str | Path, *overrides: str) -> list[Callback]:
    """The callbacks of a recipe.

    Args:
        name: One of :func:`recipes`, or the path of a YAML file.
        overrides: Changes as on Hydra's command line: ``"prune.sparsity=0.8"``; ``"finetune=null"`` leaves one out.

    Raises:
        ValueError: If there is no such recipe, or it or a change names what its callbacks do not take.

    Example:
        >>> [type(callback).__name__ for callback in recipe("magnitude", "prune.sparsity=0.8", "export=null")]
        ['GradualPruning', 'CompressionReport']
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    made = []
    for key, node in read_recipe(name, overrides).items():
        try:
            made.append(instantiate(node, _convert_="all"))
        except InstantiationException as error:
            reason = error.__cause__ or error
            raise ValueError(f"recipe name={str(name)!r}, {key}: {first_line(reason)}") from error
    return made


def split_words(words: str) -> tuple[str, list[str]]:
    """A recipe and its changes from one line.

    Example:
        >>> split_words("prune_int8 prune.sparsity=.8 export.formats=[onnx]")
        ('prune_int8', ['prune.sparsity=.8', 'export.formats=[onnx]'])
    """
    name, *overrides = shlex.split(words)
    return name, overrides


def read_recipe(name: str | Path, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """A recipe as plain values, changed and checked; what is null in it is left out.

    Raises:
        ValueError: Like :func:`recipe`.
    """
    from omegaconf import OmegaConf

    check_path("recipe.name", name, f"one of {', '.join(recipes())}, or the path of a YAML file")
    check_list("recipe.overrides", overrides, str, "such as 'prune.sparsity=0.8'")
    content = _read(name)
    names = list(content)
    for override in overrides:
        content = OmegaConf.merge(content, _change(override))
    try:
        plain: Any = OmegaConf.to_container(content, resolve=True)
    except Exception as error:  # of an interpolation, whatever is wrong with it
        raise ValueError(
            f"recipe name={str(name)!r}: {first_line(error)}. Accepted are values that resolve."
        ) from error
    nodes = {key: node for key, node in plain.items() if node is not None}
    if not nodes:
        raise ValueError(
            f"recipe name={str(name)!r} with {listed(overrides)} changed leaves no callback. Accepted is one at least."
        )
    for key, node in nodes.items():
        changes = [override for override in overrides if _address(override).partition(".")[0] == key]
        place = f"recipe name={str(name)!r}{f', overrides={changes}' if changes else ''}: {key}"
        if not isinstance(node, dict) or "_target_" not in node:
            raise ValueError(
                f"{place}={node!r} is no callback. Accepted are null and a mapping with a _target_. The recipe has "
                f"{listed(names)}.{closest(key, [other for other in names if other != key])}"
            )
        check_arguments(place, node)
    return nodes


def _read(name: str | Path) -> Any:
    """The content of a recipe's file."""
    from omegaconf import DictConfig, OmegaConf

    path = Path(name)
    known = recipes()
    if str(name) in known:
        text = files("lightning_compress.conf").joinpath("compression", f"{name}.yaml").read_text()
    elif path.suffix in _ENDINGS and path.is_file():
        text = path.read_text()
    elif path.suffix in _ENDINGS:
        raise ValueError(
            f"recipe name={str(name)!r}: there is no such file in {Path.cwd()}. Accepted is one that exists. "
            "Give its path."
        )
    else:
        raise ValueError(
            f"recipe name={str(name)!r} is none of those here: {', '.join(known)}. Accepted is one of them, or the "
            f"path of a YAML file.{closest(str(name), known)}"
        )
    try:
        content = OmegaConf.create(text)
    except Exception as error:  # whatever the parser says
        raise ValueError(
            f"recipe name={str(name)!r} is no YAML: {first_line(error)}. Accepted is a YAML file."
        ) from error
    if not isinstance(content, DictConfig) or "defaults" in content:
        raise ValueError(
            f"recipe name={str(name)!r} holds no callbacks by name. Accepted is a mapping such as "
            "prune: {_target_: lightning_compress.callbacks.GradualPruning, sparsity: 0.8}, without Hydra's defaults."
        )
    return content


def _address(override: str) -> str:
    """What a change is of, without Hydra's marks, and as it is known here."""
    address = override.lstrip("~+").partition("=")[0]
    for prefix in _PREFIXES:
        address = address.removeprefix(prefix)
    return address


def _change(override: str) -> Any:
    """One change, as a part of a recipe."""
    from omegaconf import OmegaConf

    is_gone = override.startswith("~")
    address = _address(override)
    _, equals, value = override.partition("=")
    if not address or not (equals or is_gone):
        raise ValueError(
            f"overrides={override!r} changes nothing. Accepted is name.argument=value. Write prune.sparsity=0.8, say."
        )
    try:
        return OmegaConf.from_dotlist([f"{address}=null" if is_gone else f"{address}={value}"])
    except Exception as error:  # whatever the parser says
        raise ValueError(
            f"overrides={override!r} has no value of YAML ({first_line(error)}). Accepted is name.argument=value."
        ) from error
