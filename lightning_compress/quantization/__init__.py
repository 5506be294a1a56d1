"""Quantization: what was seen (observers), how numbers are written (quantizers), what is quantized how (schemes)."""

from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.clusters import Binary, Codebook, Ternary
from lightning_compress.quantization.float8 import Float8
from lightning_compress.quantization.learned import LearnedClip, LearnedStep
from lightning_compress.quantization.levels import AdditivePowerOfTwo, Exponential, Levels, PowerOfTwo
from lightning_compress.quantization.model import quantization_of
from lightning_compress.quantization.observers import MSE, Entropy, MinMax, MovingAverage, Observer, Percentile
from lightning_compress.quantization.per_token import PerToken
from lightning_compress.quantization.quantizer import QParams, Quantizer
from lightning_compress.quantization.schemes import (
    Scheme,
    apot4,
    binary,
    codebook,
    exp4,
    fp8,
    int4,
    int8,
    log4,
    lsq,
    scheme,
    ternary,
    w2a8,
    w4_groups,
    w4a8,
    w4a8_groups,
    w8,
    w8a16,
)
from lightning_compress.quantization.short_scale import ShortScale

__all__ = [
    "MSE",
    "AdditivePowerOfTwo",
    "Affine",
    "Binary",
    "Codebook",
    "Entropy",
    "Exponential",
    "Float8",
    "LearnedClip",
    "LearnedStep",
    "Levels",
    "MinMax",
    "MovingAverage",
    "Observer",
    "PerToken",
    "Percentile",
    "PowerOfTwo",
    "QParams",
    "Quantizer",
    "Scheme",
    "ShortScale",
    "Ternary",
    "apot4",
    "binary",
    "codebook",
    "exp4",
    "fp8",
    "int4",
    "int8",
    "log4",
    "lsq",
    "quantization_of",
    "scheme",
    "ternary",
    "w2a8",
    "w4_groups",
    "w4a8",
    "w4a8_groups",
    "w8",
    "w8a16",
]
