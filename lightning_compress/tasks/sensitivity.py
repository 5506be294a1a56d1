"""What each layer's compression alone costs in accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from omegaconf import DictConfig, OmegaConf

from lightning_compress.files import free_folder
from lightning_compress.tasks.compose import build_all, check, start
from lightning_compress.tasks.progress import counted
from lightning_compress.tasks.remembered import Remembered
from lightning_compress.tasks.validation import judge_before_training, validator

if TYPE_CHECKING:
    from lightning_compress.analysis.sensitivity import Sensitivity
    from lightning_compress.callbacks.judgement import Judge

__all__ = ["measure", "sensitivity"]

_ZEROS = 0.05  # share of the weights; a dense model has hardly any


def sensitivity(cfg: DictConfig) -> None:
    """Compress one layer at a time and validate; without ``cfg.init_from`` the dense model is trained first.

    Prints a table, and writes sensitivity.json and, with matplotlib, sensitivity.png into ``cfg.dir``. Until then what
    was evaluated stands in sensitivity.cache.json: the same command with the same ``hydra.run.dir`` goes on there.

    Args:
        cfg: The composed configuration; conf/config.yaml names its fields.

    Raises:
        ValueError: If a level is out of range, or validation does not log the metric.
    """
    from rich.console import Console

    from lightning_compress.analysis.page import save_picture
    from lightning_compress.analysis.sensitivity import heat_map, table
    from lightning_compress.callbacks.outputs import written

    check(cfg)
    judge = judge_before_training(cfg, "sensitivity")
    trainer, model, data = start(cfg, build_all(cfg.callbacks), build_all(cfg.logger))
    if cfg.init_from is None:
        trainer.fit(model, data)
    _warn_of_zeros(model)
    found, metric, remembered = measure(cfg, model, data, judge)
    console = Console()
    console.print(table(found, metric))
    folder = free_folder(cfg.dir, ["sensitivity.json"])
    path = folder / "sensitivity.json"
    try:
        picture = heat_map(found, metric)
        written(folder / "sensitivity.png", lambda: save_picture(picture, folder / "sensitivity.png"))
    except ModuleNotFoundError:
        console.print("The heat map needs matplotlib. Run: pip install 'lightning-compress[report]'")
    if written(path, lambda: found.write(path)):
        remembered.forget()
        console.print(f"sensitivity: {path}", soft_wrap=True)


def _warn_of_zeros(model: Any) -> None:
    """Say so where the model has been pruned already: what it still bears is less than what it bore."""
    from lightning.pytorch.utilities import rank_zero_warn

    from lightning_compress.analysis.inspect import sparsity, weight_layers

    share = sparsity(weight_layers(model))
    if share > _ZEROS:
        rank_zero_warn(
            f"{share:.0%} of the weights are zero before anything is tried: the sensitivities are those of a pruned "
            "model. Give init_from= the dense one, unless that is meant."
        )


def measure(cfg: DictConfig, model: Any, data: Any, judge: Judge) -> tuple[Sensitivity, str, Remembered]:
    """The sensitivities of a LightningModule on its validation data, the metric's name, and what was evaluated."""
    import torch

    from lightning_compress.analysis.sensitivity import hessian_traces, sensitivity
    from lightning_compress.callbacks.evaluate import copied
    from lightning_compress.forward import record_inputs
    from lightning_compress.layers import PRUNABLE, find_layers

    options = cfg.sensitivity
    validate = validator(cfg, data)
    model = copied(model).cpu().eval()
    model._trainer = None  # noqa: SLF001  # the property raises where there is none
    logged = validate(model)
    metric = judge.see(list(logged))
    judge.check_finite(logged[metric], "")
    of = f"{metric} of seed {cfg.seed}, {OmegaConf.to_container(cfg.data, resolve=True)}"
    remembered = Remembered(lambda model: validate(model)[metric], Path(cfg.dir, "sensitivity.cache.json"), of)
    layers, _ = find_layers(model, PRUNABLE, list(options.include), list(options.exclude), skip_tied=True)
    total = 1 + len(layers) * (len(options.sparsities) + len(options.bits))
    with counted(remembered, f"sensitivity of {len(layers)} layers", total) as evaluate:
        found = sensitivity(
            model,
            evaluate,
            sparsities=list(options.sparsities),
            bits=list(options.bits),
            include=list(options.include),
            exclude=list(options.exclude),
            more_is_better=judge.mode == "max",
            inputs=record_inputs(model, lambda: validate(model)),
        )
    if options.hessian:
        batch = next(iter(data.train_dataloader()))

        def loss() -> torch.Tensor:
            with patch.object(model, "log"), patch.object(model, "log_dict"):
                out = model.training_step(batch, 0)
            return out["loss"] if isinstance(out, dict) else out

        found.traces = hessian_traces(loss, layers)
    return found, metric, remembered
