"""Core AI's optimizer (coreai-opt): magnitudes, the same share of each layer, along its polynomial schedule."""

from __future__ import annotations

import math

from coreai_opt.common import ExportBackend
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig
from coreai_opt.pruning.config import ModuleMagnitudePrunerConfig, PolynomialDecaySchedule
from coreai_opt.pruning.spec import PruningSpec
from torch import nn

from experiments.training import Budget, train

RAMP, EVERY = 0.5, 5  # the mask grows over this share of the steps, every so many


def magnitude(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Masks as parametrizations, folded at the end."""
    schedule = PolynomialDecaySchedule(total_iters=math.ceil(RAMP * budget.num_steps), update_frequency=EVERY)
    spec = {"weight": PruningSpec(target_sparsity=sparsity)}
    config = MagnitudePrunerConfig(
        global_config=ModuleMagnitudePrunerConfig(op_state_spec=spec, sparsity_schedule=schedule)
    )
    pruner = MagnitudePruner(model, config)
    train(pruner.prepare((budget.data.x_train[:1],)), budget, after=pruner.step)
    return pruner.finalize(backend=ExportBackend.Torch)
