"""Recurrent layers in the files: their int8 weights are read, and they compute in float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.deploy.formats import FORMATS
from lightning_compress.forward import Inputs
from tests.unit.helpers import quantize


class Last(nn.Module):
    """The last output of a recurrent layer, through a linear one."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(8, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("name", ["onnx", pytest.param("executorch", marks=pytest.mark.runtimes)])
def test_a_quantized_recurrent_layer_runs_in_its_file(name: str, kind: type[nn.RNNBase], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Last(kind)
    x = torch.randn(4, 6, 8)
    quantize(model, x)
    format_ = FORMATS[name]
    path = tmp_path / f"model{format_.suffix}"
    options = {} if format_.dynamic_batch else {"batch_size": 4}
    format_.export(format_.convert(model), Inputs((x,), {}), path, **options)
    expected = model(x)
    runner = format_.runner(path, expected)
    assert (runner(Inputs((x,), {})) - expected).abs().max() < 0.02 * (expected.max() - expected.min())
    kernels = runner.integer_kernels()
    assert kernels.integer < kernels.total
