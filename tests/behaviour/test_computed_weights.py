"""Layers that compute their weight whenever they run: quantized as they multiply, pruned where zeros stay zeros."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

from lightning_compress import load_from_checkpoint
from lightning_compress.callbacks import (
    SET,
    ChannelPruning,
    Export,
    GradualPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lightning_compress.deploy.packed import load_packed, save_packed
from lightning_compress.layers import find_layers
from lightning_compress.phase import Phase
from lightning_compress.pruning import Channel
from lightning_compress.quantization import Scheme, ShortScale, int8
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.model import quantization_of

from ..harness import SPARSITY, SaveAfter, callback_of, callbacks, differences, make_trainer, snapshot
from ..nightly import some
from ..zoo import BATCH_SIZE, Classifier, classes, noise

SAVED = (9, 20)  # inside of both phases


class Standardized(nn.Conv1d):
    """Weight standardization (Qiao 2019, arXiv:1903.10520), by a forward of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.weight.mean((1, 2), keepdim=True), self.weight.var((1, 2), keepdim=True)
        weight = (self.weight - mean) * (var + 1e-6).rsqrt() * self.gain * 0.2
        return F.conv1d(x, weight, self.bias, self.stride, self.padding)


class Gained(nn.Linear):
    """A gain in front of the weight: zeros stay."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.gain = nn.Parameter(torch.ones(num_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


class Symmetric(nn.Module):
    """The parametrization of torch's tutorial."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def symmetric(layer: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.utils.weight_norm(layer)


def last_axis(layer: nn.Module) -> nn.Module:
    """As wav2vec 2.0 does it: one length for each place of the kernel."""
    return parametrizations.weight_norm(layer, dim=2)


def grouped() -> nn.Module:
    return nn.Conv1d(8, 8, 3, padding=1, groups=2)


LAYERS: dict[str, Any] = {
    "weight norm": lambda: parametrizations.weight_norm(grouped()),
    "of wav2vec2": lambda: last_axis(grouped()),
    "old weight norm": lambda: old_weight_norm(nn.ConvTranspose1d(8, 8, 3, padding=1)),
    "spectral norm": lambda: parametrizations.spectral_norm(grouped()),
    "gain": lambda: Gained(16, 16),
    "standardized": lambda: Standardized(8, 8, 3, padding=1),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(16, 16)),
    "symmetric": lambda: symmetric(nn.Linear(16, 16)),
}
LOSES_ZEROS = ("standardized", "orthogonal", "symmetric")
KINDS = pytest.mark.parametrize("kind", LAYERS)
SOME_KINDS = pytest.mark.parametrize("kind", some(LAYERS, "weight norm", "standardized"))


class Net(Classifier):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.ReLU())
        self.layer = LAYERS[kind]()
        self.head = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x.unsqueeze(1))).relu().flatten(1))

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(BATCH_SIZE, 16), classes()


class Factors(TorchFunctionMode):
    """Notes the weights that functions of layers are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv1d, F.conv_transpose1d, F.linear):
            self.seen.append(args[1].detach())
        return func(*args, **(kwargs or {}))


def make(kind: str) -> Net:
    torch.manual_seed(0)
    return Net(kind)


def fit(folder: Path, module: Net, *only: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = make_trainer(folder, callbacks=[*only], **options) if only else make_trainer(folder, **options)
    trainer.fit(module)
    return trainer


@SOME_KINDS
def test_all_callbacks_reach_their_targets_and_resume_bit_for_bit(tmp_path: Path, kind: str) -> None:
    whole = make(kind)
    trainer = make_trainer(tmp_path, [SaveAfter(tmp_path, SAVED)])
    trainer.fit(whole)
    pruning = callback_of(trainer, GradualPruning)
    num = sum(layer.weight.numel() for layer in pruning.masks.layers)
    assert sum(int((layer.multiplied == 0).sum()) for layer in pruning.masks.layers) == math.ceil(SPARSITY * num)
    if kind in LOSES_ZEROS:
        assert "zeros do not stay zeros" in pruning.skipped["layer"]
    else:
        assert "layer" in [layer.name for layer in pruning.masks.layers]
    quantization = quantization_of(whole)
    assert quantization is not None
    assert [layer.name for layer in quantization.layers] == ["stem.0", "layer", "head"]
    assert not quantization.without_data()
    for saved in SAVED:
        module = make(kind)
        resumed = make_trainer(tmp_path)
        resumed.fit(module, ckpt_path=tmp_path / f"{saved}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, whole), snapshot(resumed, module)), saved


@SOME_KINDS
def test_the_layer_multiplies_by_few_values(tmp_path: Path, kind: str) -> None:
    module = make(kind)
    fit(tmp_path, module, QuantizationAwareTraining(int8()))
    with Factors() as factors:
        module.eval()(noise(2, 16))
    seen = factors.seen
    assert len(seen) == 3
    layer = find_layers(module)[0][1]
    _, params = weights(layer.module)["weight"].codes(layer.multiplied)
    steps = seen[1].movedim(layer.out_axis, 0).flatten(1) / params.scale.unsqueeze(1)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.abs().max() <= 128
    assert not torch.equal(seen[1], layer.multiplied)


@SOME_KINDS
def test_a_checkpoint_and_a_copy_are_as_was_trained(tmp_path: Path, kind: str) -> None:
    module = make(kind)
    trainer = fit(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Net, tmp_path / "last.ckpt")
    x = noise(5, 16, seed=7)
    expected = module.eval()(x)
    assert torch.equal(loaded.eval()(x), expected)
    assert list(loaded.state_dict()) == list(make(kind).state_dict())
    save_packed(module, tmp_path / "model.safetensors")
    packed = make(kind)
    load_packed(tmp_path / "model.safetensors", packed)
    assert torch.equal(packed.eval()(x), expected)
    if kind != "old weight norm":  # whose weight has a graph, which torch does not copy
        assert torch.equal(
            copy.deepcopy(module.layer)(module.stem(x.unsqueeze(1))), module.layer(module.stem(x[:, None]))
        )


@SOME_KINDS
def test_the_file_computes_what_was_trained_in_integers(tmp_path: Path, kind: str) -> None:
    module = make(kind)
    trainer = fit(tmp_path, module, *callbacks(), Export(["onnx"], tmp_path))
    export = callback_of(trainer, Export)
    transposed = kind == "old weight norm"  # onnxruntime has no integer kernel of it
    assert not export.failures
    (onnx,) = export.artifacts
    assert onnx.max_rel_diff < 0.01
    assert onnx.agreement == 1
    assert onnx.integer_kernels == (2 if transposed else 3)
    assert len(onnx.float_kernels) == transposed


@KINDS
def test_a_trained_model_is_quantized_without_training(tmp_path: Path, kind: str) -> None:
    module = make(kind)
    make_trainer(tmp_path, callbacks=[PostTrainingQuantization()]).validate(module)
    quantization = quantization_of(module)
    assert quantization is not None
    assert quantization.enabled
    assert not quantization.without_data()


@KINDS
def test_channels_go_from_what_the_weight_is_computed_from(tmp_path: Path, kind: str) -> None:
    module = make(kind)
    shrunk = [ChannelPruning(0.5, phase=Phase(0.2, 0.5)), QuantizationAwareTraining()]
    fit(tmp_path, module, *shrunk)
    assert module.stem[0].out_channels < 8 or kind in ("gain", "orthogonal", "symmetric")
    quantization = quantization_of(module)
    assert quantization is not None
    assert [layer.name for layer in quantization.layers] == ["stem.0", "layer", "head"]


@pytest.mark.parametrize("kind", ["weight norm", "of wav2vec2", "old weight norm"])
def test_a_norm_never_divides_by_nothing(tmp_path: Path, kind: str) -> None:
    module = make(kind)
    pruning = GradualPruning(0.97, phase=Phase(0.1, 0.6), floor=0.0, include=["layer"])
    with pytest.warns(UserWarning, match="target not reached"):
        fit(tmp_path, module, pruning)
    (layer,) = pruning.masks.layers
    assert torch.isfinite(layer.multiplied).all()
    assert layer.weight.flatten(1).any(1).all()
    if kind != "of wav2vec2":  # no whole place of its kernels goes
        stays = GradualPruning(0.5, pattern=Channel(), phase=Phase(0.1, 0.6))
        fit(tmp_path, make(kind), stays)
        assert "NaN" in stays.skipped["layer"]
    again = make(kind)
    fit(tmp_path, again, SET(0.9, phase=Phase(0.0, 0.8), every=2, include=["layer"]))
    assert torch.isfinite(again(noise(2, 16))).all()


def test_groups_of_four_bits(tmp_path: Path) -> None:
    module = make("orthogonal")
    scheme = Scheme(ShortScale(4), None, weight_granularity=8, include=("layer",))
    fit(tmp_path, module, QuantizationAwareTraining(scheme))
    x = noise(5, 16, seed=7)
    save_packed(module, tmp_path / "model.safetensors")
    packed = make("orthogonal")
    load_packed(tmp_path / "model.safetensors", packed)
    assert torch.equal(packed.eval()(x), module.eval()(x))
