"""Public contract checks: prove a criterion, pattern, quantizer or observer of your own in one line of your tests."""

from lightning_compress.testing.criterion import check_criterion
from lightning_compress.testing.observer import check_observer
from lightning_compress.testing.pattern import check_pattern
from lightning_compress.testing.quantizer import check_quantizer

__all__ = ["check_criterion", "check_observer", "check_pattern", "check_quantizer"]
