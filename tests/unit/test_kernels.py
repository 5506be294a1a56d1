"""Integer kernels beside onnxruntime's own quantization of the same float file: never fewer, or named."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from experiments.bench.kernels import all_nets, measure

NETS = ["functions + residual + gate", "zoo: attention"]


def counted(net: str, runtime: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measure(net, all_nets()[net], [runtime])[0]


@pytest.mark.parametrize("net", NETS)
def test_onnxruntime_finds_no_fewer_integer_kernels(net: str) -> None:
    row = counted(net, "onnxruntime")
    assert row["ours"] == row["of"] >= row["quantize_static"] > 0
    assert row["agreement"] > 0.98


@pytest.mark.runtimes
@pytest.mark.parametrize("net", [*NETS, "zoo: reused"])
def test_openvino_finds_no_fewer_integer_kernels(net: str) -> None:
    row = counted(net, "openvino")
    assert row["ours"] == row["of"] >= row["quantize_static"]
