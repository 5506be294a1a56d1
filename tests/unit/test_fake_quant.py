"""Layers upgraded in place, against plain layers and torch.ao's fake quantization."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.ao.quantization.observer import MovingAverageMinMaxObserver

from lightning_compress.layers import QUANTIZABLE, Layer, find_layers, know
from lightning_compress.quantization import Affine, MinMax, MovingAverage, Observer
from lightning_compress.quantization.fake_quant import activations, attach, upgrade, weights
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize

from .helpers import noise, randomized, run

X = noise(3, 5, 4)
TOKENS = torch.arange(15).view(3, 5) % 7
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (X,)),
    "linear-no-bias": (lambda: nn.Linear(4, 6, bias=False), (X,)),
    "conv1d": (lambda: nn.Conv1d(5, 6, 3), (X,)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding_mode="circular", padding=1), (noise(2, 4, 5, 5),)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (noise(2, 2, 3, 3, 3),)),
    "transposed1d": (lambda: nn.ConvTranspose1d(5, 6, 3), (X,)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (noise(2, 4, 5, 5),)),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), (TOKENS,)),
    "embedding-bag": (lambda: nn.EmbeddingBag(7, 4), (TOKENS,)),
    "lstm": (lambda: nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True, proj_size=3), (X,)),
    "gru": (lambda: nn.GRU(4, 6, 2), (X,)),
    "rnn": (lambda: nn.RNN(4, 6), (X,)),
    "lstm-cell": (lambda: nn.LSTMCell(4, 6), (X[:, 0],)),
    "gru-cell": (lambda: nn.GRUCell(4, 6), (X[:, 0],)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (X, X, X)),
    "attention-kv": (lambda: nn.MultiheadAttention(4, 2, kdim=5, vdim=6), (X, noise(3, 5, 5), noise(3, 5, 6))),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (X,)),
}
every_module = pytest.mark.parametrize("name", MODULES)


def make(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    build, inputs = MODULES[name]
    return randomized(build()).eval(), inputs


def upgraded(model: nn.Module, bits: int = 3, per_channel: bool = True) -> list[Layer]:
    layers = find_layers(model, QUANTIZABLE)[0]
    upgrade(layers, Affine(bits, symmetric=True), "channel" if per_channel else "tensor")
    return layers


def switch(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        for quantizer in weights(module).values():
            quantizer.enabled = on


def equal(a: Any, b: Any) -> bool:
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))


def with_quantized_parameters(model: nn.Module, bits: int, per_channel: bool) -> nn.Module:
    """The plain model whose parameters hold what torch's fused operations make of them."""
    model = copy.deepcopy(model)
    top = 2 ** (bits - 1) - 1
    for layer in find_layers(model, QUANTIZABLE)[0]:
        weight = layer.weight.detach()
        axis = layer.out_axis
        if per_channel:
            scale = weight.abs().amax([d for d in range(weight.dim()) if d != axis]) / top
            zero = torch.zeros(len(scale), dtype=torch.int32)
            layer.weight.data = torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -top, top)
        else:
            layer.weight.data = torch.fake_quantize_per_tensor_affine(
                weight, float(weight.abs().max()) / top, 0, -top, top
            )
    return model


@every_module
def test_a_disabled_layer_is_bitwise_the_plain_one(name: str) -> None:
    model, inputs = make(name)
    expected = run(model, *inputs)
    upgraded(model)
    assert equal(run(model, *inputs), expected)


@every_module
@pytest.mark.parametrize("per_channel", [True, False])
def test_an_enabled_layer_computes_with_the_weights_of_torchs_fused_operations(name: str, per_channel: bool) -> None:
    model, inputs = make(name)
    plain, reference = run(model, *inputs), run(with_quantized_parameters(model, 3, per_channel), *inputs)
    upgraded(model, 3, per_channel)
    switch(model, True)
    got = run(model, *inputs)
    assert not equal(got, plain)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(reference), strict=True):
        torch.testing.assert_close(a, b)
    switch(model, False)
    assert equal(run(model, *inputs), plain)


@every_module
def test_names_order_and_identity_of_parameters_stay(name: str) -> None:
    model, _ = make(name)
    keys, before, kinds = list(model.state_dict()), list(model.named_parameters()), [type(m) for m in model.modules()]
    upgraded(model)
    for on in (False, True):
        switch(model, on)
        assert list(model.state_dict()) == keys
        assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, id(p)) for n, p in before]
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))


@every_module
def test_the_state_is_that_of_the_plain_model_and_loads_both_ways(name: str) -> None:
    model, inputs = make(name)
    plain = copy.deepcopy(model)
    upgraded(model)
    switch(model, True)
    assert equal(list(model.state_dict().values()), list(plain.state_dict().values()))
    other = randomized(copy.deepcopy(plain), seed=5)
    model.load_state_dict(other.state_dict())
    switch(model, False)
    assert equal(run(model, *inputs), run(other, *inputs))


@every_module
@pytest.mark.parametrize("on", [False, True])
def test_a_deepcopy_and_a_pickle_compute_the_same_and_share_nothing(name: str, on: bool) -> None:
    model, inputs = make(name)
    upgraded(model)
    switch(model, on)
    expected = run(model, *inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for copied in copies:
        assert equal(run(copied, *inputs), expected)
        assert type(copied) is type(model)
        assert {id(p) for p in copied.parameters()}.isdisjoint(id(p) for p in model.parameters())
        switch(copied, not on)
        with torch.no_grad():
            for p in copied.parameters():
                p.zero_()
        assert equal(run(model, *inputs), expected)


class Raw(nn.Module):
    """A layer of the user's own that takes no arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(noise(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.raw


def test_the_class_of_an_upgraded_layer_makes_a_plain_one_and_an_empty_one() -> None:
    layer = Raw()
    know(layer, {"raw": "io"})
    upgraded(layer)
    plain = type(layer)()
    assert type(plain) is Raw
    assert not weights(plain)
    # as torch.compile does, which fills it with what the layer holds
    empty = type(layer).__new__(type(layer))
    empty.__dict__ = layer.__dict__
    switch(layer, True)
    assert equal(run(empty, X), run(layer, X))
    assert not equal(run(layer, X), X @ layer._parameters["raw"])


@every_module
def test_gradients_reach_the_stored_parameters_straight_through(name: str) -> None:
    model, inputs = make(name)
    reference = with_quantized_parameters(model, 3, True)
    upgraded(model, 3)
    switch(model, True)
    for m in (model, reference):
        outputs = torch.utils._pytree.tree_leaves(m(*inputs))
        sum((x * x).sum() for x in outputs if isinstance(x, Tensor)).backward()
    for (key, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None, key
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_layer_trains_after_its_device_and_type_were_changed() -> None:
    model, _ = make("lstm")
    upgraded(model)
    switch(model, True)
    model.double().float()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X)[0].sum().backward()
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert all(changed)


def test_an_upgrade_twice_takes_the_last_quantizer() -> None:
    model, inputs = make("linear")
    expected = run(with_quantized_parameters(model, 4, True), *inputs)
    upgraded(model, 2)
    upgraded(model, 4)
    switch(model, True)
    torch.testing.assert_close(run(model, *inputs), expected)


def test_codes_are_int8_and_stand_for_the_fake_quantized_weight() -> None:
    model, _ = make("transposed2d")
    (layer,) = upgraded(model, 8)
    quantizer = weights(model)["weight"]
    codes, (scale, _, axis, *_) = quantizer.codes(layer.weight)
    quantizer.enabled = True
    assert codes.dtype == torch.int8
    assert axis == 1
    torch.testing.assert_close(codes * scale.view(1, -1, 1, 1), model.weight.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_of_weight_and_activation_stays(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3).to(dtype)
    upgraded(model)
    switch(model, True)
    activation = ActivationFakeQuantize(Affine(), MinMax(), of_input=True)
    attach(model, activation)
    activation.observing = activation.enabled = True
    assert model(X.to(dtype)).dtype == model.weight.dtype == dtype
    assert activation.range.dtype == torch.float32


def test_autocast_does_not_reach_the_quantization() -> None:
    model, inputs = make("linear")
    upgraded(model, 8)
    switch(model, True)
    expected = model.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.weight, expected)
        assert model(*inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("of_input", [True, False])
def test_an_activation_is_that_of_torchs_fake_quantize_batch_by_batch(of_input: bool) -> None:
    reference = FakeQuantize(MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8, averaging_constant=0.1, eps=1e-12)
    model = nn.Identity()
    activation = ActivationFakeQuantize(Affine(), MovingAverage(0.1), of_input)
    attach(model, activation)
    activation.observing = True
    assert model(X) is X
    reference(X)
    activation.enabled = True
    for i in range(5):
        x = noise(40, seed=i) * (i + 1)
        # By the range of the batches before: of this one a process may have seen but a part.
        reference.disable_observer()
        expected = reference(x)
        reference.enable_observer()
        reference(x)
        torch.testing.assert_close(model(x), expected)
    activation.observing = False
    reference.disable_observer()
    torch.testing.assert_close(model(100 * X), reference(100 * X))


def test_an_activation_that_is_switched_off_hands_the_same_object_through() -> None:
    model = nn.Identity()
    for of_input in (True, False):
        attach(model, ActivationFakeQuantize(Affine(), MinMax(), of_input))
    assert model(X) is X
    assert [a.range.tolist() for a in activations(model)] == [[torch.inf, -torch.inf]] * 2


def test_what_is_no_float_tensor_passes() -> None:
    activation = ActivationFakeQuantize(Affine(), MinMax(), of_input=True)
    activation.observing = activation.enabled = True
    for value in (TOKENS, None, (X, X), "text", X > 0):
        assert activation.quantize(value) is value
    assert activation.range.tolist() == [torch.inf, -torch.inf]


def test_observing_alone_changes_no_value() -> None:
    activation = ActivationFakeQuantize(Affine(), MinMax(), of_input=True)
    activation.observing = True
    assert activation.quantize(X) is X
    assert activation.range.tolist() == [float(X.min()), float(X.max())]


class Counting(Observer):
    def __init__(self) -> None:
        self.num_updates = 0

    def update(self, seen: Tensor, values: Tensor) -> Tensor:
        self.num_updates += 1
        return MinMax().update(seen, values)


@pytest.mark.parametrize(("inputs", "expected"), [((X, X, X), 1), ((X, X + 1, X + 2), 3)])
def test_attention_observes_each_of_its_inputs_once(inputs: tuple[Tensor, ...], expected: int) -> None:
    model, observer = nn.MultiheadAttention(4, 2), Counting()
    activation = ActivationFakeQuantize(Affine(), observer, of_input=True)
    attach(model, activation)
    activation.observing = True
    run(model, *inputs)
    assert observer.num_updates == expected


def test_attention_on_itself_stays_attention_on_itself() -> None:
    activation = ActivationFakeQuantize(Affine(2), MinMax(), of_input=True)
    activation.observing = activation.enabled = True
    (q, k, v, mask), named = activation(nn.MultiheadAttention(4, 2), (X, X, X, None), {})
    assert q is k is v
    assert mask is None
    assert not named
    assert len(q.unique()) <= 4
