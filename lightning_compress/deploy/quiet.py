"""Exports without what converters and their loggers say of their own insides."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

# The second one has a level of its own, and remarks on packages that are not installed.
_LOGGERS = ("", "torch.onnx")


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing below an error is logged or warned of, whatever handlers an application has; then all is as before.

    Example:
        >>> with quiet():
        ...     logging.getLogger("onnxscript").isEnabledFor(logging.INFO)
        False
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
