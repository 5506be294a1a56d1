"""Where activations are quantized: by names, and by looking at what the layers then read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.quantization import Affine, Scheme
from lightning_compress.quantization.model import quantization_of, quantize_layers
from lightning_compress.quantization.placement import find_placement
from lightning_compress.watch import Watch

from .helpers import noise, quantize, quantized_names, randomized, run, trace

X = noise(4, 2, 8, 8)
RELUS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "module": nn.ReLU,
    "inplace-module": lambda: nn.ReLU(inplace=True),
    "function": lambda: F.relu,
    "inplace-function": lambda: lambda x: F.relu(x, inplace=True),
    "method": lambda: lambda x: x.relu(),
}


class Block(nn.Module):
    """A residual block with an identity shortcut."""

    def __init__(self, relu: str, inplace_add: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), RELUS[relu]()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), RELUS[relu]()
        self.inplace_add = inplace_add

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.inplace_add:
            y += x
        else:
            y = y + x
        return self.relu2(y)


class Residual(nn.Module):
    def __init__(self, relu: str = "module", inplace_add: bool = False) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), RELUS[relu]()
        self.block1, self.block2 = Block(relu, inplace_add), Block(relu, inplace_add)
        self.pool, self.dropout, self.flatten = nn.AdaptiveAvgPool2d(3), nn.Dropout(), nn.Flatten()
        self.fc = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.relu(self.bn(self.conv(x)))))
        return self.fc(self.dropout(self.flatten(self.pool(x))))


RESIDUAL_FOLDS = {"conv": "bn"} | {f"block{b}.conv{i}": f"block{b}.bn{i}" for b in (1, 2) for i in (1, 2)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace_add", [True, False])
@pytest.mark.parametrize("relu", ["module", "inplace-module"])
def test_residual_net_is_quantized_once_at_the_end_of_each_chain(relu: str, inplace_add: bool, training: bool) -> None:
    placement = trace(randomized(Residual(relu, inplace_add)).train(training), X)
    blocks = [f"{block}.{part}" for block in ("block1", "block2") for part in ("relu1", "bn2", "relu2")]
    assert placement.inputs == ["conv"]
    assert sorted(placement.outputs) == sorted(["relu", *blocks, "pool"])
    assert placement.folds == RESIDUAL_FOLDS


@pytest.mark.parametrize("relu", ["function", "method"])
def test_what_a_function_made_is_quantized_at_the_outermost_module_that_gives_or_receives_it(relu: str) -> None:
    placement = trace(randomized(Residual(relu)).train(), X)
    assert placement.inputs == ["conv", "block1", "block1.conv2", "block2.conv2"]
    assert sorted(placement.outputs) == ["block1", "block1.bn2", "block2", "block2.bn2", "pool"]
    assert placement.folds == RESIDUAL_FOLDS


class Operands(TorchFunctionMode):
    """The most values that an operand of a layer or of an addition holds."""

    def __init__(self) -> None:
        super().__init__()
        self.worst: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("linear", "conv1d", "conv2d", "conv_transpose2d", "lstm"):
            self._see(name, args[0])
        if name in ("add", "add_", "__add__", "__iadd__", "cat"):
            for x in args[0] if name == "cat" else args[:2]:
                self._see(name, x)
        return func(*args, **(kwargs or {}))

    def _see(self, name: str, x: Any) -> None:
        if isinstance(x, Tensor) and x.dim() >= 2:
            self.worst[name] = max(self.worst.get(name, 0), len(x.detach().unique()))


class SharedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.drop, self.fc = nn.LSTM(64, 6, batch_first=True), nn.Dropout(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.lstm(x.flatten(2))[0][:, -1]))


class AddThenConv(nn.Module):
    """A sum that a layer reads as it is."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.last(y)


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.max_pool2d(self.conv(x), 2).permute(0, 2, 3, 1).reshape(4, -1).chunk(2, 1)
        return self.fc(first) + self.fc(second)


@pytest.mark.parametrize(
    "model",
    [
        *(pytest.param(lambda r=r, i=i: Residual(r, i), id=f"residual-{r}-{i}") for r in RELUS for i in (False, True)),
        pytest.param(SharedInput, id="shared-input"),
        pytest.param(lambda: AddThenConv(False), id="add-then-conv"),
        pytest.param(lambda: AddThenConv(True), id="inplace-add-then-conv"),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout(), nn.Flatten(), nn.Linear(108, 8)), id="flat"
        ),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.ConvTranspose2d(3, 2, 3)), id="gelu"),
    ],
)
def test_every_layer_and_addition_reads_quantized_values(model: Callable[[], nn.Module]) -> None:
    net = randomized(model())
    quantize(net, X, scheme=Scheme(inputs=Affine(3)))
    with Operands() as operands:
        run(net, X)
    assert operands.worst
    assert max(operands.worst.values()) <= 2**3, operands.worst


@pytest.mark.parametrize("model", [Recurrent, Reshaped])
def test_layers_behind_a_recurrent_layer_and_behind_reshapes_read_quantized_values(model: type[nn.Module]) -> None:
    net = randomized(model())
    quantize(net, X, scheme=Scheme(inputs=Affine(3)))
    seen: dict[str, int] = {}
    for name in quantized_names(quantization_of(net)):
        hook = lambda module, args, name=name: seen.__setitem__(name, len(args[0].unique()))  # noqa: E731
        net.get_submodule(name).register_forward_pre_hook(hook)
    run(net, X)
    assert seen.keys() == quantized_names(quantization_of(net))
    assert max(seen.values()) <= 2**3


def test_names_of_a_recurrent_net() -> None:
    placement = trace(randomized(Recurrent()).train(), X)
    assert (placement.inputs, placement.outputs, placement.folds) == (["lstm", "fc"], [], {})


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_quantizes_nothing_of_its_own(inplace: bool, training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(inplace=inplace), nn.Linear(4, 2))
    placement = trace(randomized(model).train(training), noise(6, 4))
    assert (placement.inputs, placement.outputs) == (["0"], ["1"])


def test_an_input_that_two_layers_share_is_quantized_at_both() -> None:
    placement = trace(randomized(SharedInput()), X)
    assert placement.inputs == ["a", "b"]
    assert placement.outputs == ["a", "b"]


def test_a_layer_called_twice_is_placed_once() -> None:
    placement = trace(randomized(Reshaped()), X)
    assert placement.inputs == ["conv"]
    assert placement.outputs == ["conv"]


def test_attention_quantizes_what_it_receives_and_an_embedding_nothing() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mha, self.fc = nn.Embedding(7, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.embed(x)
            return self.fc(self.mha(y, y, y)[0])

    placement = trace(randomized(Model()).train(), torch.arange(12).view(3, 4) % 7)
    assert placement.outputs == ["embed"]
    assert placement.inputs == ["fc"]


class Chain(nn.Module):
    """A convolution and a norm, with something done to the convolution's output besides."""

    def __init__(self, use: Callable[[Any, Tensor], Any] = lambda model, y: model.norm(y)) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.conv(x))


def test_a_norm_right_behind_a_layer_is_folded() -> None:
    assert trace(randomized(Chain()).train(), X).folds == {"conv": "norm"}
    dense = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5))
    assert trace(randomized(dense).train(), noise(6, 8)).folds == {"0": "1"}


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda model, y: model.norm(y) + y, id="added"),
        pytest.param(lambda model, y: model.norm(y) * y.sigmoid(), id="by a function"),
        pytest.param(lambda model, y: (model.norm(y), model.other(y)), id="by a layer"),
        pytest.param(lambda model, y: (model.norm(y), y), id="returned"),
        pytest.param(lambda model, y: {"features": y, "logits": model.norm(y)}, id="returned in a dict"),
    ],
)
def test_a_norm_is_not_folded_when_the_layers_output_is_used_elsewhere(use: Callable[[Any, Tensor], Any]) -> None:
    assert trace(randomized(Chain(use)).train(), X).folds == {}


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda model, y: model.norm(y.relu()), id="behind a relu"),
        pytest.param(lambda model, y: model.norm(F.dropout(y, training=True)), id="behind a dropout"),
        pytest.param(lambda model, y: model.norm(model.norm(y)), id="norm called twice"),
        pytest.param(lambda model, y: model.norm(model.other(model.other(y))), id="layer called twice"),
    ],
)
def test_a_norm_is_not_folded_where_it_is_not_right_behind_one_layer(use: Callable[[Any, Tensor], Any]) -> None:
    assert trace(randomized(Chain(use)).train(), X).folds == {}


def test_a_norm_is_not_folded_into_a_layer_that_stays_in_float() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert trace(model, X, scheme=Scheme(exclude=["0"])).folds == {"2": "3"}


def test_a_norm_without_running_statistics_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False))
    assert trace(randomized(model), X).folds == {}


def test_a_norm_over_another_axis_than_the_layers_outputs_is_not_folded() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3))
    assert trace(randomized(model), noise(6, 3, 4)).folds == {}


def test_a_layer_that_is_left_in_float_does_not_ask_for_quantized_inputs() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    placement = trace(model, noise(6, 4), scheme=Scheme(exclude=["2"]))
    assert (placement.inputs, placement.outputs) == (["0"], [])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_without_hooks_even_after_an_error(fails: bool) -> None:
    model = randomized(Residual())
    with pytest.raises(RuntimeError) if fails else nullcontext(), Watch(model):
        model(X[:, :1] if fails else X)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert type(X + X) is Tensor


def test_watching_changes_no_value() -> None:
    model = randomized(Residual()).eval()
    expected = run(model, X)
    with Watch(model):
        assert torch.equal(run(model, X), expected)


def test_a_call_of_the_root_by_a_wrapper_is_overlooked() -> None:
    class Root(Residual):
        def forward(self, x: Tensor, step: bool = False) -> Tensor:
            return self(x) if step else super().forward(x)

    direct = trace(randomized(Root()), X)
    model = randomized(Root())
    names = quantized_names(quantize_layers(model, Scheme()))
    with torch.no_grad(), Watch(model, skip_root_calls=1) as watch:
        model(X, True)
    assert find_placement(watch.trace, model, names) == direct


def test_a_loss_inside_of_the_model_quantizes_nothing() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.loss = nn.Linear(4, 3), nn.MSELoss()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.loss(y, torch.zeros_like(y))

    placement = trace(randomized(WithLoss()), noise(5, 4))
    assert (placement.inputs, placement.outputs) == (["fc"], [])


class Summed(nn.Module):
    """A sum that something reads."""

    def __init__(self, reader: Callable[[Tensor], Tensor], cat: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.relu = nn.Linear(6, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()
        self.last = nn.Linear(16 if cat else 8, 3)
        self.reader, self.cat = reader, cat

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        return self.last(self.reader(torch.cat([y, z], -1) if self.cat else y + z))


def test_what_is_added_is_quantized_where_an_integer_kernel_reads_the_sum() -> None:
    x = noise(4, 6)
    plain = {"first", "second"}
    for cat in (False, True):
        for reader in (nn.Identity(), torch.relu, nn.ReLU()):
            outputs = trace(randomized(Summed(reader, cat)), x).outputs
            assert plain <= {*outputs}, reader
    # a norm reads it in float: of a residual stream it has the widest range of all
    placement = trace(randomized(Summed(nn.LayerNorm(8))), x)
    assert placement.outputs == ["first", "reader"]  # which the second layer and the last one read
