"""Scales moved between layers: which pairs are found, that the function stays, that the error of few bits shrinks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.quantization import Affine, Scheme
from lightning_compress.quantization.equalize import equalize
from lightning_compress.quantization.model import ModelQuantization, quantize_layers
from lightning_compress.quantization.pairs import Chains, find_pairs
from lightning_compress.watch import Watch

from .helpers import largest_difference, noise, randomized, run
from .nets import resnet

X = noise(4, 3, 8, 8)
PER_TENSOR = Scheme(Affine(8, symmetric=True), None, weight_granularity="tensor")


def trace(model: nn.Module, x: Tensor = X) -> Chains:
    layers = quantize_layers(model, PER_TENSOR).layers
    with torch.no_grad(), Watch(model) as watch:
        model(x)
    return find_pairs(watch.trace, model, layers)


def equalized(model: nn.Module, x: Tensor = X) -> ModelQuantization:
    quantization = quantize_layers(model, PER_TENSOR)
    equalize(model, quantization.layers, trace(model, x))
    return quantization


def badly_scaled(model: nn.Module, pairs: list[tuple[str, str]], seed: int = 1) -> nn.Module:
    """The same function in eval mode, with channels between pairs whose sizes differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    following = dict(zip(model.modules(), [*model.modules()][1:], strict=False))
    with torch.no_grad():
        for first, second in pairs:
            a: Any = model.get_submodule(first)
            b: Any = model.get_submodule(second)
            if getattr(b, "groups", 1) > 1 or (getattr(a, "transposed", False) and a.groups > 1):
                continue
            a = following[a] if isinstance(following[a], nn.BatchNorm2d) else a
            along = 1 if getattr(a, "transposed", False) else 0
            sizes = 10 ** (2 * torch.rand(a.weight.shape[along], generator=generator) - 1)
            a.weight.mul_(sizes.view([-1 if i == along else 1 for i in range(a.weight.dim())]))
            if a.bias is not None:
                a.bias.mul_(sizes)
            along = 0 if getattr(b, "transposed", False) else 1
            sizes = sizes.repeat_interleave(b.weight.shape[along] // len(sizes))
            b.weight.div_(sizes.view([-1 if i == along else 1 for i in range(b.weight.dim())]))
    return model.eval()


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, norms, a leaky and a learned rectifier, a mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.deep, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.point, self.act = nn.Conv2d(8, 12, 1), nn.PReLU(12)
        self.grouped, self.head = nn.Conv2d(12, 6, 3, groups=3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn1(self.deep(self.bn(self.stem(x)).relu_())), 0.1)
        return self.head(self.grouped(self.act(self.point(x))).mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.ConvTranspose2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.c = nn.ConvTranspose2d(8, 8, 2), nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.d = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.bn(self.a(x))))))))


def channels_last(model: Any) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


NETS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str]]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 3)),
        [("1", "4")],
    ),
    "flatten": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)),
        [("0", "4")],
    ),
    "channels last": (
        lambda: channels_last(nn.Sequential(nn.Conv2d(3, 5, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(45, 3))),
        [("0", "3")],
    ),
    "separable": (Separable, [("stem", "deep"), ("deep", "point"), ("point", "grouped"), ("grouped", "head")]),
    "transposed": (Transposed, [("a", "b"), ("b", "c"), ("c", "d")]),
    "residual": (resnet, [("1.conv1", "1.conv2"), ("2.conv1", "2.conv2"), ("3.conv1", "3.conv2")]),
    "three axes": (lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), [("0", "2")]),
}


@pytest.mark.parametrize("name", list(NETS))
def test_pairs_are_found_and_the_function_stays(name: str) -> None:
    build, pairs = NETS[name]
    model = randomized(build()).eval()
    expected, before = run(model, X), copy.deepcopy(model.state_dict())
    assert trace(model).pairs == pairs
    assert largest_difference(run(badly_scaled(model, pairs), X), expected) <= 1e-5 * float(expected.abs().max())
    equalized(model)
    assert largest_difference(run(model, X), expected) <= 1e-5 * float(expected.abs().max())
    assert list(model.state_dict()) == list(before)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", list(NETS))
def test_the_error_of_eight_bits_with_one_scale_shrinks(name: str) -> None:
    def error(model: nn.Module) -> float:
        expected, quantization = run(model, X), quantize_layers(model, PER_TENSOR)
        quantization.enable(True)
        found = run(model, X)
        quantization.enable(False)
        return float((found - expected).norm() / expected.norm())

    build, pairs = NETS[name]
    before, after = [], []
    for seed in range(5):
        model = badly_scaled(randomized(build(), seed), pairs, seed)
        before.append(error(model))
        equalized(model)
        after.append(error(model))
    assert sum(after) < 0.5 * sum(before)


def test_ranges_of_a_pair_agree_and_a_second_time_moves_nothing() -> None:
    model: Any = randomized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)))
    badly_scaled(model, [("0", "2"), ("2", "3")])
    r1 = torch.maximum(model[0].weight.detach().abs().amax(1), model[0].bias.detach().abs())
    r2 = model[2].weight.detach().abs().amax(0)
    single: Any = copy.deepcopy(model)
    equalize(single, quantize_layers(single, PER_TENSOR).layers, Chains([("0", "2")]), num_sweeps=1)
    assert torch.allclose(single[0].weight, model[0].weight * (r2 / (r1 * r2).sqrt()).unsqueeze(1))
    equalized(model, noise(5, 6))
    for a, b in ((0, 2), (2, 3)):
        ranges = torch.maximum(model[a].weight.abs().amax(1), model[a].bias.abs())
        assert torch.allclose(ranges, model[b].weight.abs().amax(0), rtol=5e-3)
    again = copy.deepcopy(model)
    equalized(again, noise(5, 6))
    assert largest_difference(again.state_dict(), model.state_dict()) < 5e-3


def test_behind_a_norm_the_norm_is_scaled_and_channels_of_one_scale_get_one_range() -> None:
    model: Any = randomized(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())).eval()
    expected = run(model, X)
    equalized(model)  # nothing reads it: no pair
    ranges = model[0].weight.abs().flatten(1).amax(1)
    assert torch.allclose(ranges, ranges.max().expand(8))
    assert largest_difference(run(model, X), expected) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("granularity", ["channel", 3])
def test_a_scale_a_channel_leaves_the_weight_before_a_norm(granularity: Any) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))).eval()
    before, expected = copy.deepcopy(model.state_dict()), run(model, X)
    quantization = quantize_layers(model, Scheme(weight_granularity=granularity))
    equalize(model, quantization.layers, trace(model))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {"1.weight", "1.bias", "2.weight"}
    assert largest_difference(run(model, X), expected) <= 1e-5 * float(expected.abs().max())


def test_dead_and_pruned_channels_stay() -> None:
    model: Any = randomized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).eval()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].weight[:, 1] = 0
        model[2].weight[0] *= 0
    zeros = [p == 0 for p in model.parameters()]
    expected = run(model, noise(5, 6))
    equalized(model, noise(5, 6))
    assert all(torch.equal(p == 0, z) for p, z in zip(model.parameters(), zeros, strict=True))
    assert largest_difference(run(model, noise(5, 6)), expected) < 1e-5


@pytest.mark.parametrize("norm", [True, False])
def test_a_channel_that_is_nearly_constant_is_not_blown_up(norm: bool) -> None:
    """Weight decay leaves such channels, and the activation has one scale."""
    first = nn.Sequential(nn.Linear(6, 8), *[nn.BatchNorm1d(8)] * norm, nn.ReLU())
    model: Any = randomized(nn.Sequential(first, nn.Linear(8, 3))).eval()
    with torch.no_grad():
        model[0][int(norm)].weight[0] = 1e-9
        model[0][int(norm)].bias[0] = 0.3
    before = run(model[0], noise(5, 6)).max()
    equalized(model, noise(5, 6))
    after = run(model[0], noise(5, 6))
    assert after[0, 0] < after.max() < 4 * before


class Uses(nn.Module):
    """Two layers, with something between or besides."""

    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied, self.norm, self.plain = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False)
        self.tied.weight = self.c.weight
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda m, x: m.b(m.a(x).sigmoid()), id="sigmoid"),
        pytest.param(lambda m, x: m.b(F.relu6(m.a(x))), id="relu6"),
        pytest.param(lambda m, x: m.b(m.a(x) + 1), id="constant"),
        pytest.param(lambda m, x: m.b(y := m.a(x)) + y, id="added"),
        pytest.param(lambda m, x: (m.b(y := m.a(x)), y.relu()), id="returned after a function"),
        pytest.param(lambda m, x: (m.b(y := m.a(x).relu()), y), id="returned"),
        pytest.param(lambda m, x: m.b(m.a(m.a(x))), id="first twice"),
        pytest.param(lambda m, x: m.b(m.b(x.relu())), id="second twice"),
        pytest.param(lambda m, x: m.c(m.a(x)), id="second tied"),
        pytest.param(lambda m, x: m.a(m.tied(x)), id="first tied"),
        pytest.param(lambda m, x: m.b(m.a(x)) * m.a.weight.norm(), id="weight read besides"),
        pytest.param(lambda m, x: m.b(m.plain(m.a(x).relu())), id="norm behind a function"),
        pytest.param(lambda m, x: m.b(m.norm(m.norm(m.a(x)))), id="two norms"),
        pytest.param(lambda m, x: m.b(m.a(x).T), id="other axis"),
        pytest.param(lambda m, x: m.b(m.a(x).view(4, 2, 8).transpose(1, 0).mean(0, keepdim=True)), id="transposed"),
        pytest.param(lambda m, x: m.b(F.max_pool1d(m.a(x).unsqueeze(0), 1).relu()), id="pooled over channels"),
        pytest.param(lambda m, x: m.b(m.a(x).mean(0)), id="mean over examples"),
    ],
)
def test_what_is_no_pair(use: Callable[[Any, Tensor], Any]) -> None:
    model = randomized(Uses(use)).eval()
    assert trace(model, noise(8, 8)).pairs == []


def test_a_norm_without_weights_between_two_layers_moves_nothing() -> None:
    model = randomized(Uses(lambda m, x: m.b(m.plain(m.a(x))))).eval()
    expected = run(model, noise(8, 8))
    equalized(model, noise(8, 8))
    assert torch.equal(run(model, noise(8, 8)), expected)


def test_the_model_is_left_without_hooks() -> None:
    model = Separable()
    trace(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert type(X + X) is Tensor
