"""Which kernels OpenVINO says it computes in."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import Scheme, int8, w8

from .test_recurrent_files import exported

NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), (8, 64)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)), (4, 3, 12, 12)),
}


@pytest.mark.runtimes
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("scheme", "num"), [(int8(), 2), (w8(), 0)])
def test_weights_that_are_decoded_as_they_are_read_are_not_counted_as_integer(
    name: str, scheme: Scheme, num: int, tmp_path: Path
) -> None:
    """Linear layers of w8 run in brgemm_avx2_f32, whose node has the precision i8."""
    build, shape = NETS[name]
    x = torch.randn(shape)
    runner = exported(build(), x, tmp_path, scheme, "openvino")
    assert runner.integer_kernels() == (num, 2)
    assert len(runner.float_kernels()) == 2 - num
