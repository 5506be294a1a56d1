"""What a model holds: formulas, and torch's own counter."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import int8
from lightning_compress.analysis.inspect import (
    count_macs,
    describe,
    estimate_bytes,
    layer_table,
    sparsity,
    weight_layers,
)
from lightning_compress.forward import Inputs
from lightning_compress.quantization import Affine, Scheme
from lightning_compress.quantization.model import quantize_layers

from .helpers import noise, quantize, randomized
from .test_placement import Residual


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        pytest.param(nn.Linear(7, 5), (7,), 7 * 5, id="linear"),
        pytest.param(nn.Linear(7, 5), (4, 7), 4 * 7 * 5, id="linear over time"),
        pytest.param(nn.Conv2d(4, 6, 3), (4, 8, 10), 4 * 3 * 3 * 6 * (6 * 8), id="conv2d"),
        pytest.param(nn.Conv2d(4, 6, 3, 2, 1, groups=2), (4, 8, 8), 2 * 3 * 3 * 6 * (4 * 4), id="grouped conv2d"),
        pytest.param(nn.Conv1d(3, 5, 4), (3, 10), 3 * 4 * 5 * 7, id="conv1d"),
        pytest.param(nn.ConvTranspose2d(4, 6, 3), (4, 5, 5), 4 * 6 * 3 * 3 * (5 * 5), id="transposed conv2d"),
        pytest.param(nn.LSTM(6, 5, batch_first=True), (9, 6), 9 * 4 * 5 * (6 + 5), id="lstm"),
        pytest.param(
            nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True),
            (9, 6),
            9 * 2 * 4 * 5 * ((6 + 5) + (2 * 5 + 5)),
            id="bidirectional lstm of two layers",
        ),
        pytest.param(nn.GRU(6, 5, batch_first=True), (9, 6), 9 * 3 * 5 * (6 + 5), id="gru"),
    ],
)
def test_multiplications_of_a_layer_are_its_formula(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    for batch_size in (1, 3):
        macs = count_macs(nn.Sequential(layer), Inputs((noise(batch_size, *shape),), {}))
        assert macs["0"] == macs[""] == expected


def test_attention_counts_its_projections_and_its_products() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.mha(x, x, x, need_weights=False)[0]

    length, width = 5, 8
    expected = 4 * length * width * width + 2 * length * length * width
    assert count_macs(Model().eval(), Inputs((noise(2, length, width),), {}))[""] == expected


def test_the_total_is_that_of_torchs_counter_and_the_sum_of_the_layers() -> None:
    model = randomized(Residual()).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(noise(1, 2, 8, 8))
    macs = count_macs(model, Inputs((noise(4, 2, 8, 8),), {}))
    assert macs[""] == counter.get_total_flops() // 2
    assert macs[""] == sum(macs[layer.name] for layer in weight_layers(model))
    assert macs["block1"] == macs["block1.conv1"] + macs["block1.conv2"]


def test_counting_leaves_no_hook_and_the_fast_path_as_it_was() -> None:
    model, before = nn.Sequential(nn.GRU(6, 5)), torch.backends.mha.get_fastpath_enabled()
    for width in (6, 7):
        with nullcontext() if width == 6 else pytest.raises((RuntimeError, ValueError)):
            count_macs(model, Inputs((noise(2, 9, width),), {}))
        assert torch.backends.mha.get_fastpath_enabled() is before
        assert not model[0]._forward_hooks


def test_a_recurrent_layer_that_is_called_by_name_is_counted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(6, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(input=x)[0]

    assert count_macs(Model(), Inputs((noise(1, 9, 6),), {}))[""] == 9 * 3 * 5 * (6 + 5)


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "fc": nn.Linear(4, 4), "head": nn.Linear(4, 7)})
    model.again = nn.Linear(4, 4)
    model.again.weight = model["fc"].weight
    return model


def test_the_weights_that_count_are_each_taken_once_without_embeddings_norms_and_biases() -> None:
    assert [layer.name for layer in weight_layers(tied())] == ["fc", "head"]
    assert [layer.name for layer in weight_layers(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)))] == ["1"]


def test_sparsity_is_the_share_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
    with torch.no_grad():
        model[0].weight.fill_(1.0)[:3] = 0.0
        model[1].weight.fill_(-1.0)
        model[0].bias.zero_()
    assert sparsity(weight_layers(model)) == 12 / 48
    assert sparsity(weight_layers(model)[:1]) == 12 / 16
    assert sparsity([]) == 0.0


def test_totals_count_every_parameter_once() -> None:
    model = randomized(tied())
    with torch.no_grad():
        model["fc"].weight[0] = 0
    total = 7 * 4 + 4 * 4 + 4 + 4 * 7 + 7 + 4
    expected = {"num_params": total, "num_nonzero": total - 4, "sparsity": 4 / (16 + 28), "macs": 9}
    assert describe(model, {"": 9}) == expected
    assert describe(model)["macs"] is None


def half_zero(model: nn.Module) -> nn.Module:
    model = randomized(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.flatten()[: p.numel() // 2] = 0
    return model


@pytest.mark.parametrize(
    ("scheme", "weight_bits", "input_bits"),
    [
        (None, 32, 32),
        (int8(), 8, 8),
        (Scheme(Affine(4, symmetric=True), Affine(6)), 4, 6),
        (Scheme(inputs=None), 8, 32),
    ],
)
def test_a_row_tells_a_weights_bits_zeros_and_bytes(scheme: Any, weight_bits: int, input_bits: int) -> None:
    model = half_zero(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    if scheme is not None:
        quantize(model, noise(4, 8), scheme=scheme)
    first, second = layer_table(model, {"0": 5, "2": 6})
    assert first == {
        "name": "0",
        "type": "Linear",
        "num_params": 128,
        "sparsity": 0.5,
        "weight_bits": weight_bits,
        "input_bits": input_bits,
        "macs": 5,
        "bytes": math.ceil((128 + 64 * weight_bits) / 8),
    }
    assert (second["name"], second["macs"]) == ("2", 6)
    biases = 4 * (16 + 3)
    assert estimate_bytes(model) == first["bytes"] + second["bytes"] + biases


def test_a_dense_weight_takes_no_mask() -> None:
    assert estimate_bytes(randomized(nn.Linear(8, 4))) == 4 * (32 + 4)


def test_a_prepared_model_that_is_not_enabled_counts_as_float() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    quantize_layers(model, int8())
    assert [(row["weight_bits"], row["input_bits"]) for row in layer_table(model)] == [(32, 32)]


def test_an_embedding_reads_no_quantized_input() -> None:
    model = randomized(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)))
    quantize(model, torch.arange(6).view(2, 3))
    rows = layer_table(model)
    assert [(row["type"], row["weight_bits"], row["input_bits"]) for row in rows] == [
        ("Embedding", 8, 32),
        ("Linear", 8, 8),
    ]


def test_rows_of_a_recurrent_layer_show_the_layers_multiplications() -> None:
    model = nn.ModuleDict({"net": nn.LSTM(4, 3)})
    assert [row["macs"] for row in layer_table(model, {"": 9, "net": 7})] == [7, 7]
