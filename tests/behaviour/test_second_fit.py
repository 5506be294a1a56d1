"""A model that one fit has quantized is fitted again, with optimizers that are made of its layers' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_compress.callbacks import PostTrainingQuantization, QuantizationAwareTraining
from lightning_compress.quantization.model import quantization_of

from ..harness import make_module, make_trainer


def with_groups_by_layer(module: Any) -> Any:
    """Decay for what multiplies and none for biases, as many training scripts have it, asked of the modules."""

    def configure_optimizers() -> torch.optim.Optimizer:
        layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
        kept = [
            {"params": [m.weight for m in layers], "weight_decay": 1e-3},
            {"params": [m.bias for m in layers if m.bias is not None], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(kept, 0.05)

    module.configure_optimizers = configure_optimizers
    return module


@pytest.mark.parametrize("kind", [QuantizationAwareTraining, PostTrainingQuantization])
def test_optimizers_of_a_second_fit_hold_the_parameters(kind: Any, tmp_path: Path) -> None:
    module = with_groups_by_layer(make_module("mlp"))
    make_trainer(tmp_path, callbacks=[kind()], max_epochs=3).fit(module)
    assert quantization_of(module).enabled
    trainer = make_trainer(tmp_path, callbacks=[kind()], max_epochs=3)
    trainer.fit(module)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held <= {id(p) for p in module.parameters()}
    assert quantization_of(module).enabled


def test_a_fit_that_makes_no_optimizer_leaves_the_model_quantized(tmp_path: Path) -> None:
    module = with_groups_by_layer(make_module("mlp"))
    make_trainer(tmp_path, callbacks=[QuantizationAwareTraining()], max_epochs=3).fit(module)
    before = [m.weight.clone() for m in module.modules() if isinstance(m, torch.nn.Linear)]

    def fails() -> None:
        raise RuntimeError("no rate was given")

    module.configure_optimizers = fails
    with pytest.raises(RuntimeError, match="no rate"):
        make_trainer(tmp_path, callbacks=[QuantizationAwareTraining()], max_epochs=3).fit(module)
    after = [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
