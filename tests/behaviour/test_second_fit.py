"""A model that one fit has quantized is fitted again, with optimizers that are made of its layers' weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import Scheme, convert, int8, w4_groups, w8
from lightning_compress.callbacks import PostTrainingQuantization, QuantizationAwareTraining
from lightning_compress.quantization.model import quantization_of, quantize_layers

from ..harness import make_module, make_trainer
from ..zoo import noise


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


class Adapted(nn.Module):
    """A frozen layer and what is learned beside it, which merges as peft's do: into the layer, in its place."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.up = nn.Linear(4, base_layer.out_features, bias=False)
        self.down = nn.Linear(base_layer.in_features, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))

    def merge(self) -> nn.Linear:
        self.base_layer.weight.data += self.up.weight.data @ self.down.weight.data
        return self.base_layer


@pytest.mark.parametrize("scheme", [int8(), w8(), w4_groups(4)], ids=repr)
def test_adapters_merge_into_a_quantized_base_and_are_quantized_anew(scheme: Scheme, tmp_path: Path) -> None:
    module = make_module("mlp")
    name, layer = next((n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear))
    parent, _, key = name.rpartition(".")
    holder: Any = module.get_submodule(parent)
    setattr(holder, key, Adapted(layer))
    narrow = replace(scheme, include=("*.base_layer",))
    make_trainer(tmp_path, callbacks=[QuantizationAwareTraining(narrow)], max_epochs=3).fit(module)
    adapted: Any = module.get_submodule(name)
    stored = adapted.base_layer.state_dict()["weight"].clone()
    delta = (adapted.up.weight @ adapted.down.weight).detach()
    setattr(holder, key, adapted.merge())
    merged = module.state_dict()[f"{name}.weight"]
    assert torch.equal(merged, stored + delta)
    with pytest.raises(ValueError, match=f"{name}.base_layer has another name"):
        convert(module)
    again = PostTrainingQuantization(replace(scheme, include=(name,)))
    make_trainer(tmp_path, callbacks=[again]).validate(module, verbose=False)
    quantized = quantization_of(module)
    assert quantized.enabled
    assert [x.name for x in quantized.layers] == [name]
    assert torch.equal(module.state_dict()[f"{name}.weight"], merged)
    convert(module)


def test_what_a_larger_model_was_quantized_by_is_taken_off(tmp_path: Path) -> None:
    whole = make_module("mlp")
    make_trainer(tmp_path, callbacks=[QuantizationAwareTraining()], max_epochs=3).fit(whole)
    expected = make_module("mlp")
    expected.load_state_dict(whole.state_dict())
    part, plain = whole.net.eval(), expected.net.eval()
    x = noise(5, 16)
    assert not torch.equal(part(x), plain(x))
    quantize_layers(part, w8())
    assert torch.equal(part(x), plain(x))
