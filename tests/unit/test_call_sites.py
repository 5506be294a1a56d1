"""Values that functions make: where they are quantized, and that the place is the same in every copy and file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import convert
from lightning_compress.deploy import onnx
from lightning_compress.forward import Inputs
from lightning_compress.quantization import Affine, Scheme
from lightning_compress.quantization.convert import to_float
from lightning_compress.quantization.model import ModelQuantization, quantization_of, quantize_layers

from .helpers import largest_difference, noise, quantize, randomized, run, trace

X = noise(4, 3, 8, 8)
X4 = torch.Size((4, 4, 6, 6))


class Functional(nn.Module):
    """A sum and a product of what functions made, the one inside of the root, the other inside of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.block, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), Gate(), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(F.silu(self.a(x)) + F.gelu(self.b(x))))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(F.silu(x)))


SITES = [":silu.0", ":gelu.0", "block:sigmoid.0"]


def test_what_functions_make_and_functions_read_is_quantized_where_it_is_made() -> None:
    placement = trace(randomized(Functional()), X)
    # the root's own silu, not that of the block inside of it
    assert sorted(placement.calls) == sorted(SITES)
    assert set(placement.outputs) == {"a", "b", "block.conv", "block", "last"}


class Values(torch.overrides.TorchFunctionMode):
    """The most values that an operand of a sum or a product holds."""

    def __init__(self) -> None:
        super().__init__()
        self.worst: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        images = [x for x in args if isinstance(x, Tensor) and x.dim() == 4]
        for x in images if name in ("add", "mul") and [x.shape for x in images] == [X4] * 2 else ():
            self.worst[name] = max(self.worst.get(name, 0), len(x.unique()))
        return func(*args, **(kwargs or {}))


def test_sums_and_products_of_what_functions_made_read_quantized_values() -> None:
    model = randomized(Functional())
    quantize(model, X, scheme=Scheme(inputs=Affine(3)))
    with Values() as values:
        run(model, X)
    assert values.worst.keys() == {"add", "mul"}
    assert max(values.worst.values()) <= 2**3


def of_copy(model: nn.Module, quantization: ModelQuantization) -> nn.Module:
    return copy.deepcopy(model)


def of_state(model: nn.Module, quantization: ModelQuantization) -> nn.Module:
    """Another one, with the weights and the state of a checkpoint."""
    other = Functional().eval()
    other.load_state_dict(model.state_dict())
    quantize_layers(other, quantization.scheme).load_state_dict(other, quantization.state_dict())
    return other


def of_compiler(model: nn.Module, quantization: ModelQuantization) -> nn.Module:
    return torch.compile(model, backend="eager")


def of_conversion(model: nn.Module, quantization: ModelQuantization) -> nn.Module:
    return convert(model)


def of_export(model: nn.Module, quantization: ModelQuantization) -> nn.Module:
    return torch.export.export(convert(model), (X,)).module()


@pytest.mark.parametrize("make", [of_copy, of_state, of_compiler, of_conversion, of_export])
def test_copies_quantize_the_same_values(make: Callable[..., nn.Module]) -> None:
    model = randomized(Functional())
    quantization = quantize(model, X)
    other = make(model, quantization)
    assert largest_difference(run(other, X), run(model, X)) < 1e-5
    assert largest_difference(run(to_float(model), X), run(model, X)) > 1e-3


def test_the_file_computes_the_same_in_integer_kernels(tmp_path: Any) -> None:
    model = randomized(Functional())
    quantize(model, X)
    expected = run(model, X)
    onnx.export(convert(model), Inputs((X,), {}), tmp_path / "model.onnx")
    runner = onnx.Runner(tmp_path / "model.onnx", expected)
    assert runner.integer_kernels() == (4, 4)
    step = float(expected.max() - expected.min()) / 255
    assert largest_difference(runner(Inputs((X,), {})), expected) < 2 * step


def test_a_call_that_raises_leaves_nothing_behind() -> None:
    model = randomized(Functional())
    quantize(model, X)
    expected = run(model, X)
    with pytest.raises(RuntimeError):
        run(model, X[:, :1])
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.equal(run(model, X), expected)


def test_removing_the_quantization_leaves_no_hook() -> None:
    model = randomized(Functional())
    quantize(model, X).remove(model)
    assert quantization_of(model) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Transform(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        w = self.weight
        return F.conv2d(input, w - w.mean((1, 2, 3), keepdim=True), self.bias)


class Same(nn.Conv2d):
    """An own forward that pads, and multiplies by the weight as it is."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias)


def test_a_layer_that_transforms_its_weight_is_named() -> None:
    model = randomized(nn.Sequential(Transform(3, 4, 3), nn.ReLU(), Same(4, 4, 3)))
    quantization = quantize(model, X)
    assert quantization.placement is not None
    assert quantization.placement.transformed == ["0"]
    assert quantization.without_data() == {
        "0": "it multiplies by what it computes from its weight, so it stays in float"
    }


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mha, self.fc = (
            nn.Conv2d(3, 4, 3),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(input=x).flatten(2).transpose(1, 2)
        z, _ = self.mha(key=y, query=y, value=torch.tanh(y))
        return self.fc(input=torch.tanh(z))


def test_layers_called_by_keyword_are_fed() -> None:
    model = randomized(ByKeyword())
    quantization = quantize(model, X, scheme=Scheme(inputs=Affine(3)))
    assert quantization.placement is not None
    assert quantization.placement.feeds == {
        "conv": "conv:input",
        "mha": ":tanh.0",
        "mha.out_proj": "mha:multi_head_attention_forward.0",
        "fc": "fc:input",
    }
    seen: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: seen.update({f"{name}.{key}": len(x.unique()) for key, x in kwargs.items()})

    for name in ("conv", "mha", "fc"):
        model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
    run(model, X)
    assert len(seen) == 5
    assert max(seen.values()) <= 2**3


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.net, self.head = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor, functional: bool) -> Tensor:
        x = F.gelu(self.inputs(x)) if functional else self.inputs(x)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2, 3]), batch_first=True, enforce_sorted=False)
        return self.head(self.net(packed)[1][0][-1])


@pytest.mark.parametrize(("functional", "place"), [(True, "net:input"), (False, "inputs:output")])
def test_a_packed_sequence_is_quantized(functional: bool, place: str) -> None:
    model = randomized(Packed())
    quantization = quantize(model, noise(3, 5, 6), functional, scheme=Scheme(inputs=Affine(3)))
    assert quantization.placement is not None
    assert quantization.placement.feeds["net"] == place
    seen: list[int] = []
    model.net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0].data.unique())))
    run(model, noise(3, 5, 6), functional)
    assert seen[0] <= 2**3


class Masked(nn.Module):
    """A mask of infinities is added to scores: integers would lose both."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.full((5, 5), float("-inf")), 1)
        weights = (self.q(x) @ self.k(x).transpose(1, 2) + mask).softmax(-1)
        return self.out(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + weights @ self.v(x))


def test_masks_and_statistics_stay_in_float() -> None:
    model = randomized(Masked())
    quantization = quantize(model, noise(4, 5, 6))
    assert quantization.placement is not None
    assert set(quantization.placement.calls) <= {":mul.0", ":matmul.1", ":add.1"}
    assert run(model, noise(4, 5, 6)).isfinite().all()
