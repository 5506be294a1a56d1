"""What OpenVINO answers, and which kernels it says it computes in."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import Scheme, int8, w8
from lightning_compress.forward import Inputs

from .helpers import run
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


class Net(nn.Module):
    """A forward that is given, with the layers that it names."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.given = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)

    def with_token(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1)


def tokens_of(net: Net, x: Tensor) -> Tensor:
    """Pixels after a convolution, batch by pixels by channels."""
    return net.conv(x).flatten(2).transpose(1, 2)


def token_after(*layers: nn.Module) -> Callable[[], nn.Module]:
    """A network that puts a learned vector before the pixels, and so reads its batch size."""
    return lambda: Net(lambda net, x: net.with_token(tokens_of(net, x)), conv=copy.deepcopy(nn.Sequential(*layers)))


def at_the_end(reduce: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A network that makes one vector of the answers for 17 tokens."""
    return lambda: Net(lambda net, x: reduce(net.first(x)), first=nn.Linear(8, 8))


def over_tokens(reduce: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A network that makes one vector of 17 tokens between two linear layers."""
    return lambda: Net(lambda net, x: net.last(reduce(net.first(x))), first=nn.Linear(8, 8), last=nn.Linear(8, 4))


IMAGES, TOKENS = (4, 3, 9, 9), (4, 17, 8)
CONV = nn.Conv2d(3, 8, 3)
NETS_IT_MISTOOK = {
    # a convolution lost its bias where the network reads its batch size
    "token": (token_after(nn.Conv2d(3, 8, 3, 3)), IMAGES),
    "token, depthwise": (token_after(nn.Conv2d(8, 8, 3, groups=8)), (4, 8, 9, 9)),
    "token, ReLU": (token_after(CONV, nn.ReLU()), IMAGES),
    "token, ReLU6": (token_after(CONV, nn.ReLU6()), IMAGES),
    "token, Hardtanh": (token_after(CONV, nn.Hardtanh()), IMAGES),
    "token, two layers": (token_after(CONV, nn.ReLU(), nn.Conv2d(8, 8, 3)), IMAGES),
    # integers that are added up over tokens
    "mean": (at_the_end(lambda x: x.mean(1)), TOKENS),
    "mean, kept": (at_the_end(lambda x: x.mean(1, keepdim=True)), TOKENS),
    "mean, turned": (at_the_end(lambda x: x.transpose(1, 2).mean(2)), TOKENS),
    "mean of two": (at_the_end(lambda x: x.mean((1, 2))), TOKENS),
    "sum of all": (at_the_end(lambda x: x.sum((1, 2))), TOKENS),
    # an extreme that is quantized
    "max": (over_tokens(lambda x: x.amax(1)), TOKENS),
    "min": (over_tokens(lambda x: x.amin(1)), TOKENS),
    # parts of a sequence with ranges of their own
    "token, linear": (
        lambda: Net(
            lambda net, x: net.last(net.with_token(tokens_of(net, x))), conv=nn.Conv2d(3, 8, 3), last=nn.Linear(8, 4)
        ),
        IMAGES,
    ),
}


def wide_bias(model: nn.Module) -> nn.Module:
    """Biases as large as what they are added to, so that one that is lost shows."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


@pytest.mark.runtimes
@pytest.mark.parametrize("shape", [(1, 8, 7, 7), (1, 8, 1, 1), (8, 1, 1), ()])
def test_what_is_added_to_a_convolution_stays_where_it_is_added(shape: tuple[int, ...]) -> None:
    """A number for each place of the image is no bias."""
    import openvino
    from openvino import opset13

    from lightning_compress.deploy.openvino_graph import spell_out

    torch.manual_seed(0)
    image = opset13.parameter([2, 3, 9, 9])
    products = opset13.convolution(
        image, opset13.constant(torch.randn(8, 3, 3, 3).numpy()), [1, 1], [0, 0], [0, 0], [1, 1]
    )
    added = opset13.add(products, opset13.constant(torch.randn(shape).numpy()))
    low, high = opset13.constant(np.float32(-9)), opset13.constant(np.float32(9))
    graph = openvino.Model([opset13.fake_quantize(added, low, high, low, high, 256)], [image], "added")
    x = torch.randn(2, 3, 9, 9).numpy()
    before = openvino.compile_model(graph, "CPU")(x)[0]
    spell_out(graph)
    assert np.abs(openvino.compile_model(graph, "CPU")(x)[0] - before).max() <= 18 / 255 + 1e-4  # a step, for rounding


@pytest.mark.runtimes
@pytest.mark.parametrize("name", NETS_IT_MISTOOK)
def test_the_file_answers_as_the_model(name: str, tmp_path: Path) -> None:
    """For whole batches and for parts of one. In 2026.4 each of these was wrong as it was read from ONNX."""
    torch.manual_seed(0)
    build, shape = NETS_IT_MISTOOK[name]
    model, x = wide_bias(build()), torch.randn(shape)
    runner = exported(model, x, tmp_path, int8(), "openvino")
    expected = run(model, x)
    for num in (4, 1, 3):
        difference = (runner(Inputs((x[:num],), {})) - expected[:num]).abs().max()
        assert difference < 0.02 * (expected.max() - expected.min())
