"""What the variable LIGHTNING_COMPRESS asks for, or a choice of Hydra: Lightning calls this for every Trainer.

Where neither asks, nothing else of this package is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAME = "LIGHTNING_COMPRESS"
_GROUP = "compression"

_muted = False


def callbacks() -> list[Any]:
    """The callback that adds the recipe of the variable, or of ``+compression=``, to a Trainer; none without.

    Example:
        >>> with without_variable():
        ...     callbacks()
        []
    """
    asked = os.environ.get(_NAME, "").strip()
    if asked:
        from lightning_compress.callbacks.recipe import from_variable

        return [from_variable(asked)]
    names, overrides = _chosen()
    if names:
        from lightning_compress.callbacks.recipe import from_hydra

        return [from_hydra(names, overrides)]
    return []


def of_pytorch_lightning() -> list[Any]:
    """The same for a Trainer of the package pytorch_lightning, which does not know Lightning's callbacks.

    Raises:
        ValueError: If the variable is set.
    """
    if os.environ.get(_NAME, "").strip():
        raise ValueError(
            "LIGHTNING_COMPRESS is set, and this Trainer is one of the package pytorch_lightning. Accepted is one of "
            "lightning (import lightning.pytorch), which is the same code under its present name. Unset the variable, "
            "or change the import."
        )
    return []


@contextmanager
def without_variable() -> Iterator[None]:
    """Let Trainers be made that the variable and the choice do not speak of, such as one that measures."""
    global _muted
    asked = os.environ.pop(_NAME, None)
    before = _muted
    _muted = True
    try:
        yield
    finally:
        _muted = before
        if asked is not None:
            os.environ[_NAME] = asked


def _chosen() -> tuple[list[str], list[str]]:
    """The recipes that the Hydra application of this process was called with, and the changes to them.

    Our own command takes its recipes itself: they are in the package ``compression`` of its configuration.
    """
    known: Any = sys.modules.get("hydra.core.hydra_config")
    if _muted or known is None or not known.HydraConfig.initialized():
        return [], []
    words = list(known.HydraConfig.get().overrides.task)
    if not any(_GROUP in word for word in [*words, *known.HydraConfig.get().runtime.choices]):
        return [], []
    from hydra.core.override_parser.overrides_parser import OverridesParser

    names = {
        key.partition("@")[2]: option
        for key, option in known.HydraConfig.get().runtime.choices.items()
        if key.partition("@")[0] == _GROUP
    }
    for word in OverridesParser.create().parse_overrides(words):
        if word.key_or_group == _GROUP and isinstance(word.value(), list):  # which are no choice in Hydra's record
            names[word.package or ""] = word.value()
    if _GROUP in names:
        return [], []
    listed = [name for value in names.values() for name in (value if isinstance(value, list) else [value])]
    changes = []
    for word in words:
        for place in names:
            gone, address = "~" * word.startswith("~"), word.lstrip("+~")
            if address.startswith(f"{place or 'callbacks'}."):
                changes.append(gone + address.removeprefix(f"{place or 'callbacks'}."))
    return [name for name in listed if name not in (None, "none")], changes
