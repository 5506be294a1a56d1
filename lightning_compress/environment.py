"""What the variable LIGHTNING_COMPRESS asks for: Lightning calls this for every Trainer.

Where it is not set, nothing else of this package is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAME = "LIGHTNING_COMPRESS"


def callbacks() -> list[Any]:
    """The callback that adds the recipe of the variable to a Trainer; none where the variable is not set.

    Example:
        >>> with without_variable():
        ...     callbacks()
        []
    """
    asked = os.environ.get(_NAME, "").strip()
    if not asked:
        return []
    from lightning_compress.callbacks.recipe import from_variable

    return [from_variable(asked)]


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
    """Let Trainers be made that the variable does not speak of, such as one that measures."""
    asked = os.environ.pop(_NAME, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_NAME] = asked
