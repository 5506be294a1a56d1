"""Other people's layers, whose weights are raw parameters: pruned to the weight, quantized, resumed and exported."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import load_from_checkpoint
from lightning_compress.callbacks import (
    SET,
    Export,
    GradualPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.deploy.packed import load_packed, save_packed
from lightning_compress.layers import find_layers, known
from lightning_compress.phase import Phase
from lightning_compress.pruning import NofM, Pattern, Wanda
from lightning_compress.quantization.model import quantization_of

from ..harness import SPARSITY, SaveAfter, callback_of, callbacks, differences, make_trainer, snapshot
from ..nightly import some
from ..zoo import BATCH_SIZE, Classifier, classes, noise

SAVED = (2, 9, 15, 20)  # before, inside and after the phases


class Conv1D(nn.Module):
    """As transformers has it: the weight lies as (in, out)."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_in, num_out) * num_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class OwnLinear(nn.Module):
    """As torch_geometric has it: a copy is made by its own rules."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in) * num_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def __deepcopy__(self, memo: Any) -> OwnLinear:
        made = OwnLinear(*reversed(self.weight.shape))
        made.weight = copy.deepcopy(self.weight, memo)
        return made


class Experts(nn.Module):
    """Weights of all experts in one parameter, multiplied side by side."""

    def __init__(self, num: int, num_in: int, num_out: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num, num_in, num_out) * num_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(len(self.up), *x.shape), self.up).sum(0)


class Chosen(nn.Module):
    """One expert after the other, each by its own part of the parameter."""

    def __init__(self, num: int, num_in: int, num_out: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(num, num_out, num_in) * num_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x, weight) for weight in self.experts.unbind()]).sum(0)


class Heads(nn.Module):
    """Projections of attention heads, by einsum."""

    def __init__(self, num_in: int, num_heads: int, size: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(num_in, num_heads, size) * num_in**-0.5)
        self.out = nn.Parameter(torch.randn(num_heads, size, num_in) * num_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bhk,hkd->bd", torch.einsum("bd,dhk->bhk", x, self.q).relu(), self.out)


class Net(Classifier):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.save_hyperparameters()
        self.shift = nn.Parameter(torch.zeros(1, 4))
        self.net = nn.Sequential(*LAYERS[kind]())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.shift

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(BATCH_SIZE, 16), classes()


LAYERS: dict[str, Any] = {
    "conv1d": lambda: [Conv1D(16, 32), nn.ReLU(), Conv1D(32, 4)],
    "own": lambda: [OwnLinear(16, 32), nn.ReLU(), OwnLinear(32, 4)],
    "experts": lambda: [Experts(3, 16, 32), nn.ReLU(), Experts(3, 32, 4)],
    "chosen": lambda: [Chosen(3, 16, 32), nn.ReLU(), nn.Linear(32, 4)],
    "einsum": lambda: [Heads(16, 2, 8), nn.ReLU(), nn.Linear(16, 4)],
}
AXES = {
    "conv1d": {"net.0.weight": "io", "net.2.weight": "io"},
    "own": {"net.0.weight": "oi", "net.2.weight": "oi"},
    "experts": {"net.0.up": "eio", "net.2.up": "eio"},
    "chosen": {"net.0.experts": "eoi"},
    "einsum": {"net.0.q": "ioo", "net.0.out": "iio"},
}
INTEGER = {"conv1d": 2, "own": 2, "experts": 0, "chosen": 1, "einsum": 1}  # kernels of onnxruntime
FLOAT = {"experts": {"net.0", "net.2"}, "chosen": {"net.0"}, "einsum": {"net.0"}}
KINDS = pytest.mark.parametrize("kind", LAYERS)
SOME_KINDS = pytest.mark.parametrize("kind", some(LAYERS, "conv1d", "experts"))


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
    masks = callback_of(trainer, GradualPruning).masks
    num = sum(layer.weight.numel() for layer in masks.layers)
    zeros = sum(int((layer.weight == 0).sum()) for layer in masks.layers)
    assert zeros == math.ceil(SPARSITY * num)
    assert {layer.name: layer.axes for layer in masks.layers if layer.axes} == AXES[kind]
    quantization = quantization_of(whole)
    assert quantization is not None
    assert AXES[kind].keys() <= {layer.name for layer in quantization.layers}
    assert not quantization.without_data()
    assert known(whole)["shift"] == ""
    for saved in SAVED:
        module = make(kind)
        resumed = make_trainer(tmp_path)
        resumed.fit(module, ckpt_path=tmp_path / f"{saved}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, whole), snapshot(resumed, module)), saved


@KINDS
def test_a_checkpoint_is_loaded_as_it_was_trained(tmp_path: Path, kind: str) -> None:
    module = make(kind)
    trainer = fit(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Net, tmp_path / "last.ckpt")
    x = noise(5, 16, seed=7)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert known(loaded) == known(module)
    assert list(loaded.state_dict()) == list(make(kind).state_dict())
    save_packed(module, tmp_path / "model.safetensors")
    packed = make(kind)
    load_packed(tmp_path / "model.safetensors", packed)
    assert torch.equal(packed.eval()(x), module(x))


@SOME_KINDS
def test_the_file_computes_what_was_trained(tmp_path: Path, kind: str) -> None:
    module = make(kind)
    trainer = fit(tmp_path, module, *callbacks(), Export(["onnx"], tmp_path))
    export = callback_of(trainer, Export)
    assert not export.failures
    (onnx,) = export.artifacts
    assert onnx.max_rel_diff < 0.01
    assert onnx.agreement == 1
    assert onnx.integer_kernels == INTEGER[kind]
    assert {name.partition(" ")[0] for name in onnx.float_kernels} == FLOAT.get(kind, set())
    # the weights are in the file as codes
    assert onnx.bytes < 2.2 * sum(p.numel() for p in module.parameters()) + 3000


@KINDS
def test_a_trained_model_is_quantized_without_training(tmp_path: Path, kind: str) -> None:
    module = make(kind)
    trainer = make_trainer(tmp_path, callbacks=[PostTrainingQuantization()])
    trainer.validate(module)
    quantization = quantization_of(module)
    assert quantization is not None
    assert quantization.enabled
    assert AXES[kind].keys() <= {layer.name for layer in quantization.layers}


@pytest.mark.parametrize("kind", ["conv1d", "experts", "einsum"])
@pytest.mark.parametrize("sparse", [RigL, SET])
def test_dynamic_sparse_training_takes_them(tmp_path: Path, kind: str, sparse: Any) -> None:
    module = make(kind)
    trainer = fit(tmp_path, module, sparse(0.5, phase=Phase(0.0, 0.8), every=2))
    assert callback_of(trainer, sparse).masks.sparsity == pytest.approx(0.5, abs=0.01)
    assert AXES[kind].keys() <= {layer.name for layer in callback_of(trainer, sparse).masks.layers}


@pytest.mark.parametrize(("kind", "pattern"), [("conv1d", NofM(2, 4)), ("experts", NofM(2, 4))])
def test_two_of_four_lie_along_the_inputs(tmp_path: Path, kind: str, pattern: Pattern) -> None:
    module = make(kind)
    fit(tmp_path, module, GradualPruning(0.5, pattern=pattern, phase=Phase(0.1, 0.5), every=2))
    for layer in find_layers(module)[0]:
        kept = (layer.out_first(layer.weight.detach()) != 0).unflatten(1, (-1, 4)).sum(2)
        assert set(kept.flatten().tolist()) == {2}


def test_a_criterion_that_observes_modules_refuses_them_in_words(tmp_path: Path) -> None:
    pruning = GradualPruning(0.5, criterion=Wanda(), phase=Phase(0.1, 0.5))
    with pytest.warns(UserWarning, match=r"GradualPruning prunes 0 % .* Wanda observes linear and convolution layers"):
        fit(tmp_path, make("conv1d"), pruning)
    assert pruning.skipped["net.0.weight"].startswith("Wanda observes")


def test_the_share_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    fit(tmp_path, make("conv1d"), GradualPruning(0.5, phase=Phase(0.1, 0.5)), QuantizationAwareTraining())
    logger.removeHandler(caplog.handler)
    assert "GradualPruning prunes 100 % of the 640 trainable weights that multiply" in caplog.text
    assert "QuantizationAwareTraining quantizes 100 % of the 640" in caplog.text
    assert "94 % of all 680 parameters" in caplog.text


def test_a_checkpoint_from_before_stays_as_it_was(tmp_path: Path) -> None:
    module = make("chosen")
    trainer = fit(tmp_path, module, GradualPruning(0.5, phase=Phase(0.1, 0.5), include=["net.2"]), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    (state,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("GradualPruning")]
    del state["layers"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    again = make("chosen")
    resumed = make_trainer(tmp_path, callbacks=[GradualPruning(0.5, phase=Phase(0.1, 0.5), include=["net.2"])])
    resumed.fit(again, ckpt_path=tmp_path / "old.ckpt")
    assert not known(again)


@pytest.mark.runtimes  # whose packages bring transformers
def test_gpt2_is_pruned_and_quantized_whole(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    class GPT2(Classifier):
        def __init__(self) -> None:
            super().__init__()
            options = {"bos_token_id": None, "eos_token_id": None, "use_cache": False}
            self.net = GPT2LMHeadModel(
                GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=4, n_positions=8, **options)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.net(input_ids=x).logits[:, -1]

        def tensors(self) -> tuple[Tensor, ...]:
            return torch.arange(BATCH_SIZE * 8).view(BATCH_SIZE, 8) % 4, classes()

    torch.manual_seed(0)
    module = GPT2()
    trainer = make_trainer(tmp_path)
    trainer.fit(module)
    blocks = sum(p.numel() for name, p in module.named_parameters() if ".h." in name and p.dim() == 2)
    masks = callback_of(trainer, GradualPruning).masks
    assert sum(layer.weight.numel() for layer in masks.layers if layer.axes) == blocks
    assert masks.sparsity == pytest.approx(SPARSITY, abs=1e-4)
    quantization = quantization_of(module)
    assert quantization is not None
    assert sum(layer.weight.numel() for layer in quantization.layers if layer.axes) == blocks
