"""Whether a criterion keeps its contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lightning_compress.copies import copy_module
from lightning_compress.layers import Layer
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.observation import Observation
from lightning_compress.testing.attempt import attempt, noise, random_states, refuses, require, same

__all__ = ["check_criterion"]


def check_criterion(criterion: Criterion) -> None:
    """Check that a criterion keeps the contract of :class:`lightning_compress.pruning.Criterion`.

    For the weights of linear, convolution, transposed convolution and LSTM layers that it does not refuse, also where
    some or all weights are zero, the scores are finite, in the weight's shape and the same when asked twice; the
    weight, its gradient and the global random state stay as they are.

    A criterion that observes does so first, over some training steps, with and without a batch norm and an activation
    function behind the layer: what it observes is finite, of one shape whatever the size of the batch, and changes
    neither inputs nor outputs nor gradients.

    Args:
        criterion: The criterion to check.

    Raises:
        AssertionError: If the criterion breaks the contract; the message says what is broken.

    Example:
        >>> from lightning_compress.pruning import Magnitude
        >>> check_criterion(Magnitude())
    """
    name = type(criterion).__name__
    require(isinstance(criterion, Criterion), f"{name} is no subclass of lightning_compress.pruning.Criterion")
    both = criterion.observes_activations and criterion.observes_gradients
    require(not both, f"{name} overrides observe and observe_gradient; accepted is one of them")
    num_scored = 0
    for layer in _layers():
        weight = layer.weight
        for kind, share in (("", 0.0), (" with half of the weights zero", 0.5), (" with all weights zero", 1.0)):
            where = f"for a {type(layer.module).__name__}'s {layer.parameter} of shape {tuple(weight.shape)}{kind}"
            if refuses(f"{name}.refuses {where}", criterion.refuses, layer):
                continue
            weight.data = noise(weight.shape, seed=1) * (noise(weight.shape, seed=2, uniform=True) >= share)
            seen = _observe(criterion, layer, where)
            if seen is not None:
                num_scored += 1
                _check_scores(criterion, seen, where)
    require(num_scored, f"{name} refuses every layer, or sees nothing of any")


def _check_scores(criterion: Criterion, layer: Layer, where: str) -> None:
    name = type(criterion).__name__
    weight = layer.weight
    weight.grad = noise(weight.shape, seed=3)
    kept = {"weight": weight.detach(), "weight's gradient": weight.grad, "layer's seen": layer.seen}
    before = {key: None if value is None else value.clone() for key, value in kept.items()}
    grad = weight.grad
    rng = random_states()
    with attempt(f"{name}.score {where}"):
        first = criterion.score(layer)
        second = criterion.score(layer)
    require(isinstance(first, Tensor), f"{name}.score gives a {type(first).__name__}, not a tensor, {where}")
    require(
        first.shape == weight.shape,
        f"{name}.score gives the shape {tuple(first.shape)}, not the weight's, {where}",
    )
    require(bool(torch.isfinite(first).all()), f"{name}.score is not finite {where}")
    require(torch.equal(first, second), f"{name}.score is not the same when asked twice {where}")
    for key, value in kept.items():
        require(same(value, before[key]), f"{name}.score changed the {key} {where}")
    require(weight.grad is grad, f"{name}.score changed the weight's gradient {where}")
    untouched = same(rng, random_states())
    require(untouched, f"{name}.score drew from the global random state; give it a torch.Generator")


class _Trained(nn.Module):
    """A layer with a batch norm and an activation function behind it, or with neither."""

    norm: nn.Module
    shape: tuple[int, ...]  # of one input

    def __init__(self, module: nn.Module, bare: bool) -> None:
        super().__init__()
        self.module = module
        self.bare = bare
        self.norm = nn.Identity()
        self.shape = (2, 4)
        if isinstance(module, nn.Linear):
            self.norm = nn.BatchNorm1d(module.out_features)
            self.shape = (module.in_features,)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            self.norm = nn.BatchNorm2d(module.out_channels)
            self.shape = (module.in_channels, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        y = y[0] if isinstance(y, tuple) else y
        return y if self.bare else self.norm(y).relu()


def _observe(criterion: Criterion, layer: Layer, where: str) -> Layer | None:
    """The layer with what the criterion saw of it in some steps of training; None where it sees nothing."""
    if not (criterion.observes_activations or criterion.observes_gradients or criterion.needs_norm):
        return layer
    name = type(criterion).__name__
    seen = None
    method = f"{name}.observe_gradient" if criterion.observes_gradients else f"{name}.observe"
    for bare in (False,) if criterion.needs_norm else (True, False):
        model = _Trained(layer.module, bare).train()
        plain = copy_module(model)
        observation = Observation(criterion, [layer], model)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        shapes = set()
        rng = random_states()
        with ExitStack() as stack:
            stack.callback(observation.cancel)  # its hooks, whatever happens
            for seed, size in enumerate((4, 7, 2, 5)):
                x = noise((size, *model.shape), seed)
                ours = x.clone()
                theirs = plain(x)
                pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
                for parameter in (p for pair in pairs for p in pair):
                    parameter.grad = None
                with attempt(f"{method} {where}"):
                    observation.begin_batch()
                    output = model(ours)
                require(same(ours, x), f"{method} changed the layer's inputs {where}")
                require(same(output, theirs), f"{method} changed the layer's outputs {where}")
                require(all(same(a, b) for a, b in pairs), f"{method} changed a weight {where}")
                for y in (output, theirs):
                    y.square().sum().backward()
                with attempt(f"{method} {where}"):
                    observation.observe_gradients(optimizer)
                require(all(same(a, b) for a, b in pairs), f"{method} changed a weight {where}")
                require(all(same(a.grad, b.grad) for a, b in pairs), f"{method} changed a gradient {where}")
                for found in observation.state_dict()["batch"].get(layer.name, []):
                    require(
                        isinstance(found, Tensor), f"{method} gives a {type(found).__name__}, not a tensor, {where}"
                    )
                    require(bool(torch.isfinite(found).all()), f"{method} is not finite {where}")
                    require(not found.requires_grad, f"{method} gives a tensor that holds on to its graph {where}")
                    shapes.add(tuple(found.shape))
                require(len(shapes) <= 1, f"{method} gives another shape in every batch, {sorted(shapes)}, {where}")
                observation.end_batch()
        require(same(rng, random_states()), f"{method} drew from the global random state; give it a torch.Generator")
        seen = None if observation.refuses(layer) else observation.layer(layer)
    return seen


def _layers() -> Iterator[Layer]:
    """Layers whose weights are made without the global random state."""
    kinds: Sequence[tuple[Callable[..., nn.Module], tuple[int, ...], str]] = (
        (nn.Linear, (5, 3), "weight"),
        (nn.Conv2d, (3, 4, 3), "weight"),
        (nn.ConvTranspose2d, (3, 4, 3), "weight"),
        (nn.LSTM, (4, 3), "weight_ih_l0"),
        (nn.LSTM, (4, 3), "weight_hh_l0"),
    )
    for kind, arguments, parameter in kinds:
        with torch.device("meta"):
            module = kind(*arguments)
        module = module.to_empty(device="cpu")
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(noise(p.shape, seed=0))
        yield Layer(f"{kind.__name__.lower()}.{parameter}", module, parameter)
