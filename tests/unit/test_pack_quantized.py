"""Checkpoints for vLLM, decoded by the published description of the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_compress import Scheme, int8, save_pack_quantized, w4_groups, w4a8_groups
from lightning_compress.quantization import Affine
from lightning_compress.quantization.model import quantize_layers
from tests.unit.helpers import quantize


def unpacked(state: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """A layer's weight: element i of a row lies at bit i * bits of the row, as an unsigned number around the middle."""
    num_rows, num_columns = state[f"{name}.weight_shape"].tolist()
    codes = torch.empty(num_rows, num_columns)
    for r, words in enumerate(state[f"{name}.weight_packed"].tolist()):
        row = sum((word % 2**32) << (32 * i) for i, word in enumerate(words))
        for c in range(num_columns):
            codes[r, c] = ((row >> (bits * c)) % 2**bits) - 2 ** (bits - 1)
    scale = state[f"{name}.weight_scale"].float()
    return codes * scale.repeat_interleave(num_columns // scale.shape[1], 1)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(96, 5), nn.LayerNorm(5), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("scheme", "bits", "dtype"),
    [
        (w4_groups(32, exclude=["2"]), 4, torch.bfloat16),
        (w4_groups(12, exclude=["2"]), 4, torch.bfloat16),
        (w4a8_groups(96, exclude=["2"]), 4, torch.bfloat16),
        (Scheme(Affine(8, symmetric=True), None, weight_granularity=32, exclude=["2"]), 8, torch.float32),
    ],
    ids=["32", "rows that end in half a word", "by token", "8 bits"],
)
def test_the_checkpoint_has_the_weights_that_the_model_computes_with(
    scheme: Scheme, bits: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = net()
    quantize(model, torch.randn(4, 96), scheme=scheme)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Net"]}))
    save_pack_quantized(model, tmp_path)
    state, config = read(tmp_path)
    assert torch.equal(unpacked(state, "0", bits), model[0].weight)
    assert state["0.weight_scale"].dtype == dtype
    assert set(state) == {f"0.{key}" for key in ("weight_packed", "weight_scale", "weight_shape", "bias")} | {
        *("1.weight", "1.bias", "2.weight", "2.bias")
    }
    assert torch.equal(state["2.weight"], model[2].weight)
    said = config["quantization_config"]
    assert config["architectures"] == ["Net"]
    assert said["ignore"] == ["2"]
    group = said["config_groups"]["group_0"]
    assert (group["targets"], group["weights"]["num_bits"]) == (["Linear"], bits)
    assert group["weights"]["group_size"] == scheme.weight_granularity
    assert (group["input_activations"] is None) == (scheme.inputs is None)


def test_layers_of_several_sizes_are_named_and_a_part_of_a_model_is_named_from_there(tmp_path: Path) -> None:
    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_layers(model, w4_groups(32, overrides={"body.1": w4_groups(64)})).enable(True)
    save_pack_quantized(model.body, tmp_path)
    state, config = read(tmp_path)
    groups = config["quantization_config"]["config_groups"].values()
    assert [(g["targets"], g["weights"]["group_size"]) for g in groups] == [(["0"], 32), (["1"], 64)]
    assert all(torch.equal(unpacked(state, str(i), 4), model.body[i].weight) for i in range(2))


@pytest.mark.parametrize("scheme", [None, int8()])
def test_a_model_without_groups_is_refused(scheme: Scheme | None, tmp_path: Path) -> None:
    model = net()
    if scheme is not None:
        quantize(model, torch.randn(4, 96), scheme=scheme)
    with pytest.raises(ValueError, match=r"has no nn\.Linear with quantized weights in groups: accepted is"):
        save_pack_quantized(model, tmp_path)
    assert not list(tmp_path.iterdir())
