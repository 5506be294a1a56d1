"""Loggers that answer what is read of them and write nothing, for passes that are not the user's own."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import ismethod
from typing import Any
from unittest.mock import patch

__all__ = ["Silent", "nothing", "silent_wandb"]

_PLAIN = (str, bytes, int, float, complex, type(None), os.PathLike, type)
_HOLDERS = (dict, list, set, tuple)


def nothing(*_: object, **__: object) -> None:
    """Does nothing."""


class Silent:
    """Stands in for a logger or for what it writes to: of the same type, as far as ``isinstance`` can tell.

    What it holds is answered, and so are methods that begin with ``get_``. Every other method does nothing and returns
    None, as those of Lightning's loggers do in all processes but the first.

    Args:
        of: The logger, or the experiment.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> logger = Silent(CSVLogger("logs", name="mine"))
        >>> logger.log_metrics({"loss": 1.0}, step=0)
        >>> isinstance(logger, CSVLogger), logger.name
        (True, 'mine')
    """

    def __init__(self, of: object) -> None:
        object.__setattr__(self, "_of", of)

    @property  # type: ignore[misc]  # what isinstance asks for
    def __class__(self) -> type:
        return type(self._of)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._of, name)
        if not callable(found) or isinstance(found, type):
            return _silent(found)
        if name.startswith("get_"):
            return lambda *args, **kwargs: _silent(found(*args, **kwargs))
        return nothing

    def __getitem__(self, key: Any) -> Any:
        return _silent(self._of[key])

    def __contains__(self, key: Any) -> bool:
        return key in self._of

    def __setattr__(self, name: str, value: object) -> None:
        pass

    __setitem__ = __delitem__ = __delattr__ = nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> Silent:
        return self


def _silent(found: Any) -> Any:
    """What is found in one: values as they are, and the rest as silent as itself."""
    if isinstance(found, _HOLDERS):
        return copy.copy(found)
    return found if isinstance(found, _PLAIN) else Silent(found)


@contextmanager
def silent_wandb() -> Iterator[None]:
    """Without what is written by ``wandb.log`` and the like, which know the run that is on."""
    wandb: Any = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if run is None:
        yield
        return
    bound = [name for name, value in vars(wandb).items() if ismethod(value) and value.__self__ is run]
    instead: dict[str, Any] = {**dict.fromkeys(bound, nothing), "run": Silent(run)}
    with patch.multiple(wandb, **instead):
        yield
