"""Quantization: what was seen (observers), how numbers are written (quantizers), what is quantized how (schemes)."""

from lightning_compress.quantization.observers import MinMax, MovingAverage, Observer
from lightning_compress.quantization.quantizers import Affine, QParams, Quantizer
from lightning_compress.quantization.schemes import Scheme, int8

__all__ = ["Affine", "MinMax", "MovingAverage", "Observer", "QParams", "Quantizer", "Scheme", "int8"]
