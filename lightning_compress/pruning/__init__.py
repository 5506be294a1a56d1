"""Pruning: how much (schedules), which (criteria), in what shape (patterns), giving masks."""

from lightning_compress.pruning.criteria import (
    LAMP,
    APoZ,
    BatchNormScale,
    Criterion,
    Magnitude,
    MeanActivation,
    Movement,
    Random,
    SparedMagnitude,
    Taylor,
    Wanda,
)
from lightning_compress.pruning.masks import Masks
from lightning_compress.pruning.observation import Observation
from lightning_compress.pruning.patterns import Block, Channel, Element, Head, NofM, Pattern, WholeLayer
from lightning_compress.pruning.schedules import Constant, Cubic, Exponential, Linear, Rounds, Schedule

__all__ = [
    "LAMP",
    "APoZ",
    "BatchNormScale",
    "Block",
    "Channel",
    "Constant",
    "Criterion",
    "Cubic",
    "Element",
    "Exponential",
    "Head",
    "Linear",
    "Magnitude",
    "Masks",
    "MeanActivation",
    "Movement",
    "NofM",
    "Observation",
    "Pattern",
    "Random",
    "Rounds",
    "Schedule",
    "SparedMagnitude",
    "Taylor",
    "Wanda",
    "WholeLayer",
]
