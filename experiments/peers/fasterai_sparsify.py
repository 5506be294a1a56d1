"""fasterai: its Sparsifier along one of its schedules, as its callback for fastai drives it, in another loop."""

from __future__ import annotations

from fasterai.core.criteria import large_final
from fasterai.core.schedule import Schedule, sched_agp
from fasterai.sparse.sparsifier import Sparsifier
from torch import nn

from experiments.training import WEIGHTED, Budget, train

RAMP = 0.5  # the share of the steps over which its masks grow


def magnitude(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """All layers ranked together, along the cubic (automated gradual pruning); the other half wins back."""
    sparsifier = Sparsifier(model, "weight", "global", large_final, layer_type=WEIGHTED)
    schedule = Schedule(sched_agp, end_pct=RAMP)

    def before(step: int, num_steps: int) -> None:
        share = sparsity * schedule.progress(round(step / num_steps, 3))
        if schedule.changed:
            sparsifier.sparsify_model(share)

    def after() -> None:
        schedule.after_step()
        sparsifier._apply_masks()  # noqa: SLF001  # as its callback does

    train(model, budget, before, after)
    sparsifier._clean_buffers()  # noqa: SLF001  # what it registers at modules
    return model
