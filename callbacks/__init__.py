"""Lightning callbacks: each translates the loop's hooks into calls of the engine."""

from .blocks import LayerPruning
from .channels import ChannelPruning
from .distillation import KnowledgeDistillation
from .dynamic import SET, RigL
from .export import Export
from .finetuning import FineTuning
from .guard import AccuracyGuard
from .launched import bring_back
from .post_training import PostTrainingQuantization
from .protocol import Compressing
from .pruning import GradualPruning
from .quantization import QuantizationAwareTraining
from .recipe import Recipe
from .report import CompressionReport

__all__ = [
    "SET",
    "AccuracyGuard",
    "ChannelPruning",
    "Compressing",
    "CompressionReport",
    "Export",
    "FineTuning",
    "GradualPruning",
    "KnowledgeDistillation",
    "LayerPruning",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "Recipe",
    "RigL",
]

bring_back()
