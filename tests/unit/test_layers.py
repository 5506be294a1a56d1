"""Where: layers by kind and name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.layers import PRUNABLE, QUANTIZABLE, Layer, find_layers, matches, modules_by_name
from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.fake_quant import upgrade, weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.encoder = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)


def names(model: nn.Module, *args: object, **kwargs: object) -> list[str]:
    return [layer.name for layer in find_layers(model, *args, **kwargs)[0]]


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("a.b", ["a.b"], True),
        ("a.b", ["a"], True),
        ("ab.c", ["a"], False),
        ("a.b", ["*.b"], True),
        ("a.b", ["?.b"], True),
        ("a.b", ["B"], False),
        ("a.b", ["x", "a.[bc]"], True),
        ("a.b", [], False),
    ],
)
def test_a_name_matches_itself_a_prefix_and_a_glob(name: str, patterns: list[str], expected: bool) -> None:
    assert matches(name, patterns) is expected


def test_layers_come_in_module_order_without_norms_and_embeddings() -> None:
    layers, skipped = find_layers(Net())
    assert [layer.name for layer in layers] == ["encoder.0", "encoder.2", "head"]
    assert list(skipped) == ["embed"]
    assert "include" in skipped["embed"]


def test_quantizable_layers_hold_embeddings_too() -> None:
    assert names(Net(), QUANTIZABLE) == ["embed", "encoder.0", "encoder.2", "head"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["encoder"], [], ["encoder.0", "encoder.2"]),
        (["encoder.*"], ["encoder.0"], ["encoder.2"]),
        (["head", "embed"], [], ["embed", "head"]),
        ([], ["encoder", "h*"], []),
        (["*"], ["embed"], ["encoder.0", "encoder.2", "head"]),
    ],
)
def test_include_and_exclude_pick_by_name(include: list[str], exclude: list[str], expected: list[str]) -> None:
    layers, skipped = find_layers(Net(), PRUNABLE, include, exclude)
    assert [layer.name for layer in layers] == expected
    assert set(skipped) == {"embed", "encoder.0", "encoder.2", "head"} - set(expected)


@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["haed", "enc", "encoder.1", "encoder.0.weight"])
def test_a_pattern_that_matches_no_layer_is_an_error_that_lists_them(field: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='{pattern}' matches no layer") as error:
        find_layers(Net(), **{field: ["head", pattern]})
    assert all(name in str(error.value) for name in ("embed", "encoder.0", "encoder.2", "head"))


def test_every_kind_of_layer_is_found_and_holds_its_stored_weight() -> None:
    kinds = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    model = nn.ModuleList([nn.Linear(2, 3), *(kind(2, 3, 1) for kind in kinds)])
    layers, skipped = find_layers(model)
    assert [layer.weight for layer in layers] == [module.weight for module in model]
    assert not skipped


def test_recurrent_and_attention_layers_give_each_weight_by_its_parameter_name() -> None:
    modules = {
        "lstm": nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
        "gru": nn.GRU(3, 4),
        "cell": nn.LSTMCell(3, 4),
    }
    model = nn.ModuleDict({**modules, "mha": nn.MultiheadAttention(4, 2, kdim=3, vdim=5)})
    expected = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    found = {layer.name.replace("out_proj", "out_proj.weight"): layer.weight for layer in find_layers(model)[0]}
    assert found.keys() == expected.keys()
    assert all(found[name] is expected[name] for name in expected)


@pytest.mark.parametrize(
    ("module", "axis"), [(nn.Conv2d(2, 3, 1), 0), (nn.ConvTranspose2d(2, 3, 1), 1), (nn.Linear(2, 3), 0)]
)
def test_out_axis_is_the_axis_of_the_output_channels(module: nn.Module, axis: int) -> None:
    layer = Layer("x", module)
    assert layer.out_axis == axis
    assert layer.weight.shape[axis] == 3


CHANNELS = {
    "linear": (nn.Linear(6, 4, bias=False), (2, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, bias=False), (2, 6, 5)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, bias=False), (2, 6, 5, 5)),
    "transposed": (nn.ConvTranspose1d(6, 4, 3, bias=False), (2, 6, 5)),
    "grouped transposed": (nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), (2, 6, 5, 5)),
}


@pytest.mark.parametrize("kind", CHANNELS)
def test_the_weight_of_channels_is_what_scales_their_outputs_and_inputs(kind: str) -> None:
    module, shape = CHANNELS[kind]
    layer = Layer(kind, module)
    x = torch.randn(shape)
    plain = module(x)
    assert plain.shape[layer.channel_axis] == layer.num_outputs
    trailing = (-1, *[1] * (x.dim() - 2))
    outputs = torch.rand(layer.num_outputs) + 0.5
    inputs = torch.rand(shape[1]) + 0.5
    stored = module.weight.data
    for factor, expected in (
        (layer.spread_outputs(outputs), plain * outputs.view(trailing)),
        (layer.spread_inputs(inputs), module(x * inputs.view(trailing))),
    ):
        module.weight.data = stored * factor
        torch.testing.assert_close(module(x), expected)
        module.weight.data = stored


def test_neighbouring_inputs_behind_a_flatten_are_of_one_channel() -> None:
    layer = Layer("head", nn.Linear(6, 2))
    assert layer.spread_inputs(torch.tensor([3, 4])).tolist() == [[3, 3, 3, 4, 4, 4]] * 2


@pytest.mark.parametrize("kind", CHANNELS)
def test_output_channels_come_first_and_go_back(kind: str) -> None:
    module, (_, num_inputs, *_) = CHANNELS[kind]
    layer = Layer(kind, module)
    first = layer.out_first(module.weight)
    assert first.shape[:2] == (layer.num_outputs, num_inputs // getattr(module, "groups", 1))
    assert torch.equal(layer.out_first(first), module.weight)


def test_the_name_of_a_module_is_the_layers_without_its_parameter() -> None:
    parts = {"fc": nn.Linear(2, 2), "weight": nn.Linear(2, 2), "mha": nn.MultiheadAttention(2, 1)}
    for model in (nn.ModuleDict({"inner": nn.ModuleDict(parts)}), nn.LSTM(2, 2)):
        modules = modules_by_name(model)
        for layer in find_layers(model)[0]:
            assert modules[layer.module_name] is layer.module, layer.name


def test_the_weight_of_a_layer_is_the_stored_one_whatever_the_module_shows() -> None:
    module = nn.Linear(3, 3)
    stored = module.weight
    upgrade([Layer("fc", module)], Affine(2, symmetric=True), "tensor")
    weights(module)["weight"].enabled = True
    assert not torch.equal(module.weight, stored)
    assert Layer("fc", module).weight is stored


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_parametrized_weight_is_known_by_what_it_is_computed_from(norm: Any) -> None:
    net = nn.Sequential(norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    layers, skipped = find_layers(net)
    assert [layer.name for layer in layers] == ["0", "1"]
    assert not skipped
    assert layers[0].weight.shape == (3, 3)
    assert any(layers[0].weight is p for p in net[0].parametrizations.parameters())
    torch.testing.assert_close(layers[0].multiplied, net[0].weight.detach())
    assert layers[1].multiplied is net[1].weight


class Outer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.mT

    def right_inverse(self, x: Tensor) -> Tensor:
        return x[:, :2].detach().clone()


def test_a_weight_that_nothing_of_its_shape_is_computed_to_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.utils.parametrize.register_parametrization(net[0], "weight", Outer(), unsafe=True)
    layers, skipped = find_layers(net)
    assert [layer.name for layer in layers] == ["1"]
    assert skipped == {"0": "its weight is computed by code that does not tell from which parameter"}


def test_a_raw_parameter_is_left_alone_with_the_reason() -> None:
    model = Net()
    model.encoder.register_parameter("raw", nn.Parameter(torch.ones(2, 2)))
    model.encoder.register_parameter("vector", nn.Parameter(torch.ones(2)))
    _, skipped = find_layers(model, include=["encoder.raw", "head"])
    assert "raw parameter of Sequential" in skipped["encoder.raw"]
    assert "encoder.vector" not in skipped


def test_a_lazy_layer_is_left_alone_with_the_reason() -> None:
    assert "lazy" in find_layers(nn.Sequential(nn.LazyLinear(3)))[1]["0"]


def test_an_integer_weight_is_left_alone_with_the_reason() -> None:
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    layers, skipped = find_layers(nn.Sequential(linear))
    assert not layers
    assert "torch.int8" in skipped["0"]


def test_a_tied_weight_is_taken_once_where_asked_and_twice_else() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    layers, skipped = find_layers(model, skip_tied=True)
    assert [layer.name for layer in layers] == ["0"]
    assert skipped == {"2": "shares its weight with 0"}
    assert names(model) == ["0", "2"]


def test_a_frozen_weight_is_left_alone_where_asked_unless_named() -> None:
    model = Net()
    model.encoder.requires_grad_(False)
    layers, skipped = find_layers(model, skip_frozen=True)
    assert [layer.name for layer in layers] == ["head"]
    assert "frozen" in skipped["encoder.0"]
    assert names(model, include=["encoder"], skip_frozen=True) == ["encoder.0", "encoder.2"]
    assert names(model) == ["encoder.0", "encoder.2", "head"]


def test_a_module_with_two_names_is_found_once() -> None:
    model = Net()
    model.alias = model.head
    assert names(model) == ["encoder.0", "encoder.2", "head"]


def test_names_are_those_of_the_plain_model_when_it_is_compiled() -> None:
    plain = Net()
    expected = {name: module for name, module in plain.named_modules() if name}
    found = modules_by_name(torch.compile(plain))
    assert {name: found[name] for name in expected} == expected
    assert names(torch.compile(plain)) == names(plain)


def test_names_are_those_of_the_plain_model_when_a_part_is_compiled() -> None:
    model = Net()
    expected = names(model)
    model.encoder = torch.compile(model.encoder)
    assert names(model) == expected


def test_names_are_those_of_the_plain_model_when_a_layer_is_compiled() -> None:
    model = Net()
    expected = names(model)
    model.head = torch.compile(model.head)
    assert names(model) == expected
