"""What criteria see: averages over batches, against hooks by hand."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.layers import Layer, find_layers
from lightning_compress.pruning import APoZ, BatchNormScale, Criterion, MeanActivation, Movement, Observation, Taylor
from lightning_compress.pruning import Wanda as WandaCriterion

from .helpers import noise, randomized


class Net(nn.Module):
    """A layer, maybe a batch norm, and a function as a user writes it; ``end`` is what it gives for the layer."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm
        self.module = function if isinstance(function, nn.Module) else None
        self.function = function
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y if self.norm is None else self.norm(y)
        return self.dropout(self.function(y)) * 3


def batches(*shape: int, num: int = 4) -> list[Tensor]:
    return [noise(*shape, seed=seed) + 0.1 * seed for seed in range(num)]


def observe(model: nn.Module, criterion: Criterion, inputs: Sequence[Tensor], **options: Any) -> Observation:
    observation = Observation(criterion, find_layers(model)[0], model)
    for x in inputs:
        observation.begin_batch()
        model(x)
        observation.end_batch(**options)
    return observation


def averaged(values: Sequence[Tensor], memory: float = 0.99) -> Tensor:
    """Exponentially weighted, the last one most, the weights summing to 1; the first batch was only watched."""
    weights = [memory**age for age in reversed(range(len(values)))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "functional relu": (F.relu, lambda y: y.clamp(min=0)),
    "functional relu in place": (lambda y: F.relu(y, inplace=True), lambda y: y.clamp(min=0)),
    "relu by name": (lambda y: F.relu(input=y), lambda y: y.clamp(min=0)),
    "method relu_": (lambda y: y.relu_(), lambda y: y.clamp(min=0)),
    "torch.relu": (torch.relu, lambda y: y.clamp(min=0)),
    "nn.ReLU": (nn.ReLU(), lambda y: y.clamp(min=0)),
    "nn.ReLU in place": (nn.ReLU(inplace=True), lambda y: y.clamp(min=0)),
    "nn.ReLU6": (nn.ReLU6(), lambda y: y.clamp(0, 6)),
    "nn.Hardtanh": (nn.Hardtanh(-0.3, 0.2, inplace=True), lambda y: y.clamp(-0.3, 0.2)),
    "hardtanh by position": (lambda y: F.hardtanh(y, -0.5, 0.25), lambda y: y.clamp(-0.5, 0.25)),
    "nn.LeakyReLU": (nn.LeakyReLU(0.3, inplace=True), lambda y: torch.where(y > 0, y, 0.3 * y)),
    "leaky_relu_": (lambda y: F.leaky_relu_(y, 0.7), lambda y: torch.where(y > 0, y, 0.7 * y)),
    "nn.ELU": (nn.ELU(2.0), lambda y: torch.where(y > 0, y, 2 * (y.exp() - 1))),
    "nn.GELU": (nn.GELU(), lambda y: y * (1 + torch.erf(y / 2**0.5)) / 2),
    "nn.GELU tanh": (
        nn.GELU("tanh"),
        lambda y: y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))) / 2,
    ),
    "nn.SiLU": (nn.SiLU(), lambda y: y / (1 + (-y).exp())),
    "nn.Tanh": (nn.Tanh(), lambda y: (y.exp() - (-y).exp()) / (y.exp() + (-y).exp())),
    "method sigmoid": (lambda y: y.sigmoid(), lambda y: 1 / (1 + (-y).exp())),
    "nothing": (lambda y: y, lambda y: y),
    "no function known here": (F.softplus, lambda y: y),
    "in-place sum before relu": (lambda y: y.add_(1).relu(), lambda y: y),
    "sum before relu": (lambda y: F.relu(y + 1), lambda y: y),
}


@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations_are_those_behind_norm_and_function(function: str, normed: bool) -> None:
    written, formula = FUNCTIONS[function]
    model = Net(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5) if normed else None, written)
    randomized(model)
    inputs, found = batches(3, 2, 6, 6), []
    reference = copy.deepcopy(model)
    for x in inputs:
        y = F.conv2d(x, reference.layer.weight, reference.layer.bias)
        if normed:
            centred = y - y.mean((0, 2, 3), keepdim=True)
            y = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
            y = y * reference.norm.weight.view(-1, 1, 1) + reference.norm.bias.view(-1, 1, 1)
        found.append(formula(y.detach()))
    for criterion, kind in ((MeanActivation(), Tensor.abs), (APoZ(), lambda a: (a > 0).float())):
        observation = observe(model, criterion, inputs)
        expected = averaged([kind(a).mean((0, 2, 3)) for a in found[1:]])
        layer = observation.layer(Layer("layer", model.layer))
        torch.testing.assert_close(layer.seen, expected, rtol=1e-5, atol=1e-6)
        assert layer.norm is (model.norm if normed else None)


LAYERS = {
    "linear": (nn.Linear(4, 6), (5, 4)),
    "linear on sequences": (nn.Linear(4, 6), (5, 3, 4)),
    "linear without a batch": (nn.Linear(4, 6), (4,)),
    "conv1d": (nn.Conv1d(4, 6, 3), (5, 4, 7)),
    "conv2d": (nn.Conv2d(4, 6, 3), (5, 4, 5, 5)),
    "conv2d without a batch": (nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv3d": (nn.Conv3d(4, 6, 1), (2, 4, 3, 3, 3)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (5, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), (5, 4, 5, 5)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_and_outputs_are_averaged_by_channel_in_float(kind: str, dtype: torch.dtype) -> None:
    module, shape = LAYERS[kind]
    model = Net(copy.deepcopy(module), None, F.relu).to(dtype)
    inputs, seen = [600 * x.to(dtype) for x in batches(*shape)], []
    with torch.no_grad():
        for x in inputs[1:]:
            x, y = x.double(), F.relu(model.layer(x)).double()
            axis = 1 - module.weight.dim()
            seen.append([t.movedim(axis, 0).reshape(t.shape[axis], -1).mean(1) for t in (x.square(), y)])
        wanda, mean = (observe(model, c, inputs).average("layer") for c in (WandaCriterion(), MeanActivation()))
    assert wanda.dtype == mean.dtype == torch.float32
    for got, expected in ((wanda, [x for x, _ in seen]), (mean, [y for _, y in seen])):
        assert bool(torch.isfinite(got).all())
        torch.testing.assert_close(got.double(), averaged(expected), rtol=1e-4, atol=1e-6)


def test_a_module_called_twice_is_averaged_over_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(F.relu(self.fc(x))))

    model = randomized(Twice())
    x = noise(6, 4)
    first = F.relu(F.linear(x, model.fc.weight, model.fc.bias))
    second = F.relu(F.linear(first, model.fc.weight, model.fc.bias))
    got = observe(model, MeanActivation(), [x, x]).average("fc")
    torch.testing.assert_close(got, (first.mean(0) + second.mean(0)).detach() / 2)


def test_layers_and_norms_in_eval_mode_are_seen_too() -> None:
    """A model left in eval mode trains with frozen norms, and is pruned like any other."""
    model = randomized(Net(nn.Linear(3, 4), nn.BatchNorm1d(4), F.relu)).eval()
    x = noise(6, 3)
    expected = F.relu(model.norm(model.layer(x))).mean(0).detach()
    torch.testing.assert_close(observe(model, MeanActivation(), [x, x]).average("layer"), expected)


@pytest.mark.parametrize("criterion", [MeanActivation(), APoZ(), WandaCriterion()])
def test_observing_changes_no_bit_of_outputs_and_gradients(criterion: Criterion) -> None:
    model, inputs = randomized(Net(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True))), batches(2, 2, 5, 5)
    plain = copy.deepcopy(model)
    observation = Observation(criterion, find_layers(model)[0], model)
    for x in inputs:
        observation.begin_batch()
        torch.manual_seed(0)
        ours = model(x)
        ours.sum().backward()
        observation.end_batch()
        torch.manual_seed(0)
        theirs = plain(x)
        theirs.sum().backward()
        assert torch.equal(ours, theirs)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    assert not model.layer._forward_hooks
    assert not model.layer._forward_pre_hooks
    assert not model.norm._forward_hooks


def train(model: nn.Module, criterion: Criterion, optimizer: torch.optim.Optimizer, accumulate: int) -> Any:
    """Several steps with gradients accumulated; gives the observation, and by step the weights and gradients."""
    observation, taken = Observation(criterion, find_layers(model)[0], model), []
    for step in range(5):
        for part in range(accumulate):
            observation.begin_batch()
            model(noise(6, 3, seed=10 * step + part)).square().mean().backward()
            if part == accumulate - 1:
                observation.observe_gradients(optimizer)
                taken.append({k: (p.detach().clone(), p.grad.clone()) for k, p in model.named_parameters()})
                optimizer.step()
                optimizer.zero_grad()
            observation.end_batch()
    return observation, taken


@pytest.mark.parametrize("accumulate", [1, 3])
def test_taylor_and_movement_are_their_formulas_over_steps(accumulate: int) -> None:
    for criterion in (Taylor(), Movement()):
        model = randomized(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))
        observation, taken = train(model, criterion, torch.optim.SGD(model.parameters(), 0.3), accumulate)
        assert len(taken) == 5
        for layer in observation.layers.values():
            pairs = [step[f"{layer.name}.weight"] for step in taken]
            if isinstance(criterion, Taylor):
                expected = averaged([(w * g) ** 2 for w, g in pairs])
            else:
                expected = -sum(w * g for w, g in pairs)
            torch.testing.assert_close(criterion.score(observation.layer(layer)), expected)


def test_only_the_optimizer_that_steps_shows_its_gradients() -> None:
    model = randomized(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    observation, _ = train(model, Taylor(), torch.optim.SGD(model[1].parameters(), 0.1), 1)
    assert set(observation.seen) == {"1"}
    assert observation.refuses(Layer("0", model[0])) == "no optimizer took a step with its gradient"
    assert observation.refuses(Layer("1", model[1])) is None


def test_movement_sums_the_steps_of_one_batch() -> None:
    model = randomized(nn.Linear(3, 2))
    optimizer, expected = torch.optim.SGD(model.parameters(), 0.5), torch.zeros(2, 3)
    observation = Observation(Movement(), find_layers(model)[0], model)
    observation.begin_batch()
    for seed in range(3):
        optimizer.zero_grad()
        model(noise(4, 3, seed=seed)).square().mean().backward()
        observation.observe_gradients(optimizer)
        expected -= model.weight.detach() * model.weight.grad
        optimizer.step()
    observation.end_batch()
    torch.testing.assert_close(observation.average("weight"), expected)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_step_that_a_gradient_scaler_skips_is_not_seen(value: float) -> None:
    model = randomized(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    observation = Observation(Taylor(), find_layers(model)[0], model)
    for bad in (True, False):
        model(noise(4, 3)).sum().backward()
        if bad:
            model[1].weight.grad[0, 0] = value
        observation.observe_gradients(optimizer)
        observation.end_batch()
        assert observation.ready is not bad
        optimizer.zero_grad()
    assert all(bool(torch.isfinite(seen).all()) for seen in observation.seen.values())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm2d()])
def test_the_norm_right_behind_is_found(norm: nn.Module) -> None:
    model = Net(nn.Conv2d(2, 4, 3), norm, F.relu)
    model(noise(1, 2, 5, 5))
    if isinstance(norm, nn.SyncBatchNorm):
        model.eval()
    observation = observe(model, BatchNormScale(), [noise(2, 2, 5, 5)])
    layer = Layer("layer", model.layer)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5]))
    expected = torch.tensor([1.0, 2.0, 0.0, 0.5]).view(-1, 1, 1, 1).expand(4, 2, 3, 3)
    assert torch.equal(BatchNormScale().score(observation.layer(layer)), expected)
    assert observation.ready
    assert observation.refuses(layer) is None


@pytest.mark.parametrize(
    ("norm", "function"),
    [
        (None, F.relu),
        (None, nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))),
        (nn.BatchNorm2d(4, affine=False), F.relu),
        (nn.GroupNorm(2, 4), F.relu),
    ],
)
def test_without_a_weighted_norm_right_behind_the_layer_is_refused(norm: Any, function: Any) -> None:
    model = Net(nn.Conv2d(2, 4, 3), norm, function)
    observation = observe(model, BatchNormScale(), [noise(2, 2, 5, 5)])
    assert observation.refuses(Layer("layer", model.layer)) == "no batch norm with a weight follows it"


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_without_weights_is_still_before_the_function(affine: bool) -> None:
    norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=affine)
    model, x = Net(nn.Conv2d(2, 4, 3), norm, F.relu), noise(3, 2, 5, 5)
    expected = F.relu(model.norm(model.layer(x))).mean((0, 2, 3)).detach()
    torch.testing.assert_close(observe(model, MeanActivation(), [x, x]).average("layer"), expected)


class Functional(nn.Module):
    """Its layer's weight is read, but the module is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.used(x), self.unused.weight)


@pytest.mark.parametrize("num", [1, 2])
def test_layers_that_are_never_called_are_refused_and_waited_for_no_longer_than_a_batch(num: int) -> None:
    model = Functional()
    observation = observe(model, MeanActivation(), [noise(5, 3)] * num)
    assert observation.ready == (num == 2)
    assert observation.refuses(Layer("unused", model.unused)) == "it was never called as a module"
    blind = Observation(MeanActivation(), [Layer("unused", model.unused)], model)
    for _ in range(num):
        blind.begin_batch()
        model(noise(5, 3))
        blind.end_batch()
    assert blind.ready == (num == 2)
    assert not blind.seen


@pytest.mark.parametrize("criterion", [MeanActivation(), Taylor(), Movement(), BatchNormScale()])
def test_the_state_loads_without_pickle_and_goes_on_bit_for_bit(criterion: Criterion) -> None:
    """Whether it was written behind a batch or inside of one; also inside of the first."""
    model = randomized(Net(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Hardtanh(-0.5, 0.5)))
    optimizer, states, inputs = torch.optim.SGD(model.parameters(), 0.0), [], batches(3, 2, 5, 5, num=5)

    def go_on(observation: Observation, inputs: Sequence[Tensor], keep: bool = False) -> None:
        for x in inputs:
            observation.begin_batch()
            optimizer.zero_grad()
            model(x).sum().backward()
            observation.observe_gradients(optimizer)
            if keep:
                states.append(copy.deepcopy(observation.state_dict()))
            observation.end_batch()
            if keep:
                states.append(copy.deepcopy(observation.state_dict()))

    model.dropout.p = 0.0
    whole = Observation(criterion, find_layers(model)[0], model)
    go_on(whole, inputs, keep=True)
    for i, state in enumerate(states):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        again = Observation(criterion, find_layers(model)[0], model)
        again.load_state_dict(torch.load(buffer, weights_only=True))
        go_on(again, inputs[i // 2 + 1 :])
        ours, theirs = (o.layer(Layer("layer", model.layer)) for o in (again, whole))
        assert (ours.seen is None and theirs.seen is None) or torch.equal(ours.seen, theirs.seen), i
        assert ours.norm is theirs.norm
        assert again.ready == whole.ready


def test_processes_that_called_other_layers_agree_on_those_that_all_called() -> None:
    """One of two processes leaves a branch out: nobody waits for it, and its average is left alone."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.always(self.sometimes(x) if self.extra else x)

    class Process:
        """Plays the other process: what it contributes to each reduction, in order."""

        def __init__(self, answers: list[Tensor]) -> None:
            self.answers = answers

        def __call__(self, value: Tensor) -> Tensor:
            other = self.answers.pop(0)
            assert other.shape == value.shape
            return (value + other) / 2

    model = randomized(Branch())
    observation = Observation(MeanActivation(), find_layers(model)[0], model)
    model.extra = True
    for answers in ([torch.zeros(2)], [torch.tensor([1.0, 0.0]), torch.ones(3)]):
        observation.begin_batch()
        y = model(noise(4, 3)).detach()
        other = Process(answers)
        observation.end_batch(other)
        assert not other.answers
    assert set(observation.seen) == {"always"}
    torch.testing.assert_close(observation.average("always"), (y.abs().mean(0) + 1) / 2)
