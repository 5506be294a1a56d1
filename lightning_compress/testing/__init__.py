"""Public contract checks: prove a criterion, pattern, quantizer, observer or callback of your own in one line."""

from lightning_compress.testing.callback import check_callback
from lightning_compress.testing.criterion import check_criterion
from lightning_compress.testing.observer import check_observer
from lightning_compress.testing.pattern import check_pattern
from lightning_compress.testing.quantizer import check_quantizer

__all__ = ["check_callback", "check_criterion", "check_observer", "check_pattern", "check_quantizer"]
