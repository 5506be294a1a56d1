"""What each layer's compression alone costs in accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from omegaconf import DictConfig

from lightning_compress.tasks.compose import build_all, check, start
from lightning_compress.tasks.validation import validator

if TYPE_CHECKING:
    from lightning_compress.analysis.sensitivity import Sensitivity

__all__ = ["measure", "sensitivity"]


def sensitivity(cfg: DictConfig) -> None:
    """Compress one layer at a time and validate; without ``cfg.init_from`` the dense model is trained first.

    Prints a table, and writes sensitivity.json and, with matplotlib, sensitivity.png into ``cfg.dir``.

    Args:
        cfg: The composed configuration; conf/config.yaml names its fields.

    Raises:
        ValueError: If a level is out of range, or validation does not log the metric.
    """
    from rich.console import Console

    from lightning_compress.analysis.sensitivity import heat_map, table

    check(cfg)
    trainer, model, data = start(cfg, build_all(cfg.callbacks), build_all(cfg.logger))
    if cfg.init_from is None:
        trainer.fit(model, data)
    found, metric = measure(cfg, model, data)
    folder = Path(cfg.dir)
    found.write(folder / "sensitivity.json")
    console = Console()
    console.print(table(found, metric))
    try:
        heat_map(found, metric).savefig(folder / "sensitivity.png", dpi=110)
    except ModuleNotFoundError:
        console.print("The heat map needs matplotlib. Run: pip install 'lightning-compress[report]'")
    console.print(f"sensitivity: {folder / 'sensitivity.json'}", soft_wrap=True)


def measure(cfg: DictConfig, model: Any, data: Any) -> tuple[Sensitivity, str]:
    """The sensitivities of a LightningModule on its validation data, and the name of the metric."""
    import torch

    from lightning_compress.analysis.sensitivity import hessian_traces, sensitivity
    from lightning_compress.callbacks.evaluate import choose_metric, copied, more_is_better
    from lightning_compress.forward import record_inputs
    from lightning_compress.layers import PRUNABLE, find_layers

    options = cfg.sensitivity
    validate = validator(cfg, data)
    model = copied(model).cpu().eval()
    model._trainer = None  # noqa: SLF001  # the property raises where there is none
    logged = validate(model)
    metric = choose_metric("sensitivity.monitor", options.monitor, list(logged))
    found = sensitivity(
        model,
        lambda model: validate(model)[metric],
        sparsities=list(options.sparsities),
        bits=list(options.bits),
        include=list(options.include),
        exclude=list(options.exclude),
        more_is_better=more_is_better(metric),
        inputs=record_inputs(model, lambda: validate(model)),
    )
    if options.hessian:
        layers, _ = find_layers(model, PRUNABLE, list(options.include), list(options.exclude), skip_tied=True)
        batch = next(iter(data.train_dataloader()))

        def loss() -> torch.Tensor:
            with patch.object(model, "log"), patch.object(model, "log_dict"):
                out = model.training_step(batch, 0)
            return out["loss"] if isinstance(out, dict) else out

        found.traces = hessian_traces(loss, layers)
    return found, metric
