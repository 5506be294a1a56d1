"""Lightning callbacks: each translates the loop's hooks into calls of the engine."""

from .dynamic import SET, RigL
from .export import Export
from .finetuning import FineTuning
from .pruning import GradualPruning
from .quantization import QuantizationAwareTraining
from .report import CompressionReport

__all__ = ["SET", "CompressionReport", "Export", "FineTuning", "GradualPruning", "QuantizationAwareTraining", "RigL"]
