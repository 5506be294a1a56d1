"""Layers are what they compute: which raw parameters a model multiplies by, and along which axes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.layers import PRUNABLE, QUANTIZABLE, Layer, find_layers, know, known
from lightning_compress.multiplied import find_axes
from lightning_compress.pruning import Channel, NofM
from lightning_compress.quantization import Affine
from lightning_compress.quantization.fake_quant import upgrade, weights
from lightning_compress.quantization.fake_quantizers import WeightFakeQuantize
from lightning_compress.share import share_taken
from lightning_compress.watch import Watch

Use = Callable[[Tensor, Tensor], object]  # of data of shape (7, 4) and of a weight


class Net(nn.Module):
    def __init__(self, use: Use, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x: Tensor) -> object:
        return self.use(x, self.w)


def axes_of(model: nn.Module, x: Tensor | None = None) -> dict[str, str]:
    with Watch(model) as watch:
        model(torch.randn(7, 4) if x is None else x)
    return find_axes(model, [watch.trace])


def each(x: Tensor, w: Tensor) -> list[Tensor]:
    return [F.linear(x, w[i]) for i in range(len(w))]


def chosen(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), w[torch.arange(7) % len(w)])


MULTIPLIED: dict[str, tuple[str, tuple[int, ...], Use]] = {
    "linear": ("oi", (5, 4), F.linear),
    "linear by keyword": ("oi", (5, 4), lambda x, w: F.linear(input=x, weight=w)),
    "conv1d of transformers": ("io", (4, 5), lambda x, w: torch.addmm(torch.zeros(5), x, w)),
    "@": ("io", (4, 5), lambda x, w: x @ w),
    "@ from the left": ("oi", (5, 4), lambda x, w: w @ x.t()),
    "@ of a transpose": ("oi", (5, 4), lambda x, w: x @ w.t()),
    "@ of T": ("oi", (5, 4), lambda x, w: x @ w.T),
    "square T": ("oi", (4, 4), lambda x, w: x @ w.T),
    "square mT": ("oi", (4, 4), lambda x, w: x @ w.mT),
    "square data": ("io", (4, 4), lambda x, w: x @ w.data),
    "square permuted": ("oi", (4, 4), lambda x, w: x @ w.permute(1, 0)),
    "square moved": ("oi", (4, 4), lambda x, w: x @ w.movedim(0, -1)),
    "cast": ("io", (4, 5), lambda x, w: x.double() @ w.double()),
    "slices": ("io", (4, 10), lambda x, w: [x @ w[:, :5], x @ w[..., 5:]]),
    "chunks": ("io", (4, 15), lambda x, w: [x @ part for part in w.chunk(3, -1)]),
    "view": ("iio", (2, 2, 5), lambda x, w: x @ w.view(4, 5)),
    "einsum": ("ioo", (4, 2, 3), lambda x, w: torch.einsum("td,dhk->thk", x, w)),
    "einsum with an ellipsis": ("io", (4, 5), lambda x, w: torch.einsum("...d,de->...e", x, w)),
    "einsum without a result": ("io", (4, 5), lambda x, w: torch.einsum("td,de", x, w)),
    "batched": ("eio", (3, 4, 5), lambda x, w: torch.bmm(x.expand(3, 7, 4), w)),
    "batched transpose": ("eoi", (3, 5, 4), lambda x, w: torch.baddbmm(torch.zeros(1), x.expand(3, 7, 4), w.mT)),
    "each expert": ("eoi", (3, 5, 4), each),
    "chosen experts": ("eio", (3, 4, 5), chosen),
    "one output each": ("ei", (3, 4), lambda x, w: torch.einsum("thd,hd->th", x.unsqueeze(1).expand(7, 3, 4), w)),
    "convolution": ("oik", (6, 4, 3), lambda x, w: F.conv1d(x.t()[None], w)),
    "transposed convolution": ("iok", (4, 6, 3), lambda x, w: F.conv_transpose1d(x.t()[None], w)),
    "bilinear": ("oii", (5, 4, 4), lambda x, w: F.bilinear(x, x, w)),
}
OTHERS: dict[str, tuple[tuple[int, ...], Use]] = {
    "added": ((7, 4), lambda x, w: x + w),
    "positions": ((9, 4), lambda x, w: x + w[:7]),
    "scales": ((1, 4), lambda x, w: x * w),
    "summed products": ((3, 4), lambda x, w: (x.unsqueeze(1) * w).sum(-1)),
    "token": ((1, 4), lambda x, w: torch.cat([w, x])),
    "a product of weights": ((4, 4), lambda x, w: (x, w @ w.t())),
    "computed": ((5, 4), lambda x, w: F.linear(x, w / w.norm())),
    "grouped transposed convolution": ((4, 3, 3), lambda x, w: F.conv_transpose1d(x.t()[None], w, groups=2)),
}


@pytest.mark.parametrize("name", MULTIPLIED)
def test_a_parameter_that_multiplies_is_found_with_its_axes(name: str) -> None:
    axes, shape, use = MULTIPLIED[name]
    assert axes_of(Net(use, *shape)) == {"w": axes}


@pytest.mark.parametrize("name", OTHERS)
def test_one_that_does_something_else_is_none(name: str) -> None:
    shape, use = OTHERS[name]
    assert axes_of(Net(use, *shape)) == {"w": ""}


def test_outputs_come_first_as_the_product_has_them() -> None:
    x = torch.randn(3, 7, 4)
    layer = Layer("w", Net(torch.bmm, 3, 4, 5), "w", axes="eio")
    rows = layer.out_first(layer.weight.detach())
    by_rows = torch.stack([x[e] @ rows[e * 5 + o] for e in range(3) for o in range(5)])
    by_product = torch.bmm(x, layer.weight.detach()).transpose(1, 2).reshape(15, 7)
    torch.testing.assert_close(by_rows, by_product)


@pytest.mark.parametrize("axes", ["oi", "io", "eio", "eoi", "ioo", "iio", "oik", "iok", "ei", "oii"])
def test_what_is_turned_is_turned_back(axes: str) -> None:
    layer = Layer("w", Net(F.linear, *range(2, 2 + len(axes))), "w", axes=axes)
    turned = layer.out_first(layer.weight)
    assert turned.dim() == 2 + axes.count("k")
    assert layer.as_stored(turned).equal(layer.weight)


@pytest.mark.parametrize("pattern", [NofM(2, 4), Channel()])
def test_patterns_lie_along_the_inputs_of_each_expert(pattern: NofM | Channel) -> None:
    layer = Layer("w", Net(torch.bmm, 3, 8, 5), "w", axes="eio")
    scores = layer.out_first(layer.weight.detach().abs())
    reduced = pattern.reduce(scores)
    kept = pattern.protects(reduced) if isinstance(pattern, NofM) else reduced > reduced.median()
    assert kept is not None
    mask = layer.as_stored(pattern.expand(kept, scores.shape))
    if isinstance(pattern, NofM):
        assert set(mask.unflatten(1, (2, 4)).sum(2).flatten().tolist()) == {2}
    else:
        assert set(mask.sum(1).flatten().tolist()) == {0, 8}


def test_scales_are_by_output_channel() -> None:
    net = Net(torch.matmul, 4, 5)
    net.w.data *= torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4])
    know(net, {"w": "io"})
    (layer,), _ = find_layers(net)
    upgrade([layer], Affine(8, symmetric=True))
    quantizer = weights(net)["w"]
    assert quantizer.qparams(layer.weight).scale.shape == (5,)
    quantizer.enabled = True
    error = (net.w - layer.weight).detach().abs().amax(0) / layer.weight.abs().amax(0)
    assert float(error.max()) <= 1 / 254 + 1e-6


def test_groups_are_neighbours_along_the_inputs() -> None:
    weight = torch.randn(2, 8, 3)
    shown = WeightFakeQuantize(Affine(4, symmetric=True), axis=2, group=4)
    shown.enabled = True
    single = WeightFakeQuantize(Affine(4, symmetric=True), axis=1, group=4)
    single.enabled = True
    for expert in range(2):
        torch.testing.assert_close(shown(weight)[expert], single(weight[expert]))


def test_known_layers_need_no_trace_and_stay_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.MultiheadAttention(4, 2), nn.Embedding(3, 4), nn.LSTM(4, 4))
    before = [(layer.name, layer.parameter, layer.axes) for layer in find_layers(net, QUANTIZABLE)[0]]
    know(net, find_axes(net, []))
    assert [(layer.name, layer.parameter, layer.axes) for layer in find_layers(net, QUANTIZABLE)[0]] == before
    assert {axes for _, _, axes in before} == {""}


def test_copies_know_and_state_dict_does_not_hold_it() -> None:
    net = Net(torch.matmul, 4, 5)
    keys = list(net.state_dict())
    know(net, axes_of(net))
    copied = copy.deepcopy(net)
    assert [layer.axes for layer in find_layers(copied)[0]] == ["io"]
    assert known(copied) is not known(net)
    assert list(net.state_dict()) == keys


def test_only_kinds_with_linear_layers_take_raw_parameters() -> None:
    net = Net(torch.matmul, 4, 5)
    know(net, {"w": "io"})
    assert [layer.name for layer in find_layers(net, PRUNABLE)[0]] == ["w"]
    assert find_layers(net, (nn.Conv2d,))[1] == {"w": "Net is taken only when include names it"}


def test_why_a_raw_parameter_is_left_alone_says_what_is_known() -> None:
    net = Net(torch.add, 7, 4)
    assert find_layers(net)[1] == {"w": "a raw parameter of Net, which is not a kind of layer known here"}
    know(net, axes_of(net))
    assert find_layers(net)[1] == {"w": "a raw parameter of Net, by which no step multiplies"}


class Two(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Net(torch.matmul, 4, 4), Net(torch.matmul, 4, 4)
        self.b.w = self.a.w

    def forward(self, x: Tensor) -> object:
        return self.b(self.a(x))


def test_a_tied_weight_is_one_layer() -> None:
    net = Two()
    know(net, axes_of(net))
    layers, skipped = find_layers(net, skip_tied=True)
    assert [layer.name for layer in layers] == ["a.w"]
    assert skipped == {"b.w": "shares its weight with a.w"}


class Adapted(nn.Linear):
    """A known layer with weights of its own beside the known one."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


def test_weights_beside_a_known_one_are_layers_too() -> None:
    net = nn.Sequential(Adapted())
    assert [layer.name for layer in find_layers(net)[0]] == ["0"]
    know(net, axes_of(net))
    assert [(layer.name, layer.axes) for layer in find_layers(net)[0]] == [("0", ""), ("0.down", "oi"), ("0.up", "oi")]


class Whole(nn.Module):
    """A matrix from half of it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x])

    def right_inverse(self, x: Tensor) -> Tensor:
        return x[: len(x) // 2].detach().clone()


def test_a_small_share_names_the_largest_that_are_left() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(10, 10), nn.Embedding(9, 9))
    nn.utils.parametrize.register_parametrization(net[1], "weight", Whole(), unsafe=True)
    layers, skipped = find_layers(net)
    share = share_taken(net, layers, skipped)
    assert (share.taken, share.multiplying) == (12, 112)
    assert share.is_small
    assert share.largest == "1 (100 weights: its weight is computed by code that does not tell from which parameter)"
    layers, skipped = find_layers(net, exclude=["1"])
    assert not share_taken(net, layers, {**skipped, "1": "excluded by name"}).is_small


class Standard(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.conv1d(x, weight - weight.mean((1, 2), keepdim=True), self.bias)


class AsStored(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).relu()


def test_what_a_forward_of_its_own_multiplies_by_is_watched() -> None:
    net = nn.Sequential(Standard(4, 4, 3), AsStored(3, 3), nn.Linear(3, 3))
    assert [layer.source for layer in find_layers(net)[0]] == ["", "", ""]
    found = axes_of(net, torch.randn(2, 4, 5))
    assert found == {"0.weight": "", "1.weight": "oi"}
    know(net, found)
    first, *others = find_layers(net)[0]
    assert first.source == "weight"
    assert [layer.source for layer in others] == ["", ""]
    expected = first.weight - first.weight.mean((1, 2), keepdim=True)
    torch.testing.assert_close(first.multiplied, expected.detach())
