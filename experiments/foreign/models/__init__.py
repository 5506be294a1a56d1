"""Small models of other people's packages, with random weights: a LightningModule and data for each."""

from __future__ import annotations

from collections.abc import Callable

from . import audio, graphs, series, tables, text, vision, volumes
from .wrapped import Made

__all__ = ["MODELS", "Made"]

_FIELDS = (text, vision, audio, volumes, graphs, series, tables)

MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    name: model for field in _FIELDS for name, model in field.MODELS.items()
}
"""The package and what makes the model, by name; packages are imported when it is called."""
