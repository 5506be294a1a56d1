"""Pruning: how much (schedules), which (criteria), in what shape (patterns), giving masks."""

from lightning_compress.pruning.criteria import Criterion, Magnitude, Random
from lightning_compress.pruning.masks import Masks
from lightning_compress.pruning.patterns import Element, Pattern
from lightning_compress.pruning.schedules import Constant, Cubic, Exponential, Linear, Schedule

__all__ = [
    "Constant",
    "Criterion",
    "Cubic",
    "Element",
    "Exponential",
    "Linear",
    "Magnitude",
    "Masks",
    "Pattern",
    "Random",
    "Schedule",
]
