"""Code that knows nothing of a quantization writes to ``layer.weight``, as it would to a plain layer's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import convert, int8, load_packed, save_packed
from lightning_compress.deploy.files import write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.forward import Inputs
from lightning_compress.quantization.model import quantize_layers

from .helpers import noise


def clip_norm(layer: Any) -> None:
    """As nets with a maximal norm do in their forward."""
    layer.weight.data = torch.renorm(layer.weight.data, p=2, dim=0, maxnorm=0.5)


def merge(layer: Any) -> None:
    """As peft merges an adapter."""
    layer.weight.data += noise(*layer.weight.shape, seed=3)


def scale_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.weight *= 0.5


def set_row(layer: Any) -> None:
    with torch.no_grad():
        layer.weight[0] = 0.25


def initialize(layer: Any) -> None:
    torch.manual_seed(0)
    nn.init.kaiming_uniform_(layer.weight)


def clamp(layer: Any) -> None:
    layer.weight.data.clamp_(-0.1, 0.1)


def load(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.copy_(noise(*layer.weight.shape, seed=4))


WRITES: list[Callable[[Any], None]] = [clip_norm, merge, scale_in_place, set_row, initialize, clamp, load]
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(4, 6), noise(3, 4)),
    "conv": (lambda: nn.Conv2d(2, 4, 3), noise(2, 2, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), torch.arange(7)),
}


def quantized(layer: nn.Module) -> nn.Module:
    quantize_layers(layer, int8()).enable(True)
    return layer


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_written_is_stored_and_then_quantized(name: str, write: Callable[[Any], None]) -> None:
    build, x = LAYERS[name]
    plain = build()
    layer = quantized(copy.deepcopy(plain))
    write(plain)
    write(layer)
    stored, written = layer.state_dict()["weight"], plain.state_dict()["weight"]
    assert torch.equal(stored, written)
    expected = quantized(plain)(x)
    assert torch.equal(layer(x), expected)


def test_gradients_hooks_and_freezing_are_those_of_the_parameter() -> None:
    layer: Any = quantized(nn.Linear(4, 6))
    seen: list[Tensor] = []
    layer.weight.register_hook(seen.append)
    layer(noise(3, 4)).sum().backward()
    (parameter, _) = layer.parameters()
    assert layer.weight.grad is parameter.grad is not None
    assert torch.equal(seen[0], parameter.grad)
    layer.weight.requires_grad = False
    assert not parameter.requires_grad
    layer.weight.requires_grad_(True)
    assert parameter.requires_grad


def test_what_is_computed_from_a_weight_is_a_plain_tensor_of_quantized_values() -> None:
    layer: Any = quantized(nn.Linear(4, 6))
    doubled = layer.weight * 2
    assert type(doubled) is Tensor
    assert type(layer(noise(3, 4))) is Tensor
    assert not torch.equal(doubled, 2 * layer.state_dict()["weight"])
    assert torch.equal(doubled, 2 * layer.weight)


def test_it_is_saved_as_its_values_and_copied_as_the_parameter() -> None:
    layer: Any = quantized(nn.Linear(4, 6))
    buffer = io.BytesIO()
    torch.save({"weight": layer.weight}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer)["weight"]  # weights alone: no class of ours
    assert type(saved) is Tensor
    assert torch.equal(saved, layer.weight)
    copied = copy.deepcopy(layer.weight)
    assert type(copied) is nn.Parameter
    assert torch.equal(copied, layer.state_dict()["weight"])


def test_a_part_of_a_quantized_model_is_refused_where_the_whole_one_is_taken(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 2))
    quantize_layers(model, int8()).enable(True)
    example = Inputs((noise(2, 4),), {})
    for refused in (
        lambda: convert(model[0]),
        lambda: save_packed(model[0], tmp_path / "part.packed"),
        lambda: write_files(FORMATS["onnx"], model[0], example, tmp_path / "part.onnx", (1,)),
    ):
        with pytest.raises(ValueError, match="This Sequential is a part of a quantized model, as 0 shows"):
            refused()
    assert not list(tmp_path.iterdir())
    save_packed(model, tmp_path / "whole.packed")
    fresh = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 2))
    load_packed(tmp_path / "whole.packed", fresh)
    assert torch.equal(fresh(noise(2, 4)), model(noise(2, 4)))
