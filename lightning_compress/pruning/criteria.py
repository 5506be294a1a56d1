"""Which: a score for every weight; the higher, the more it is worth keeping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_compress.checks import check_number, check_whole_number
from lightning_compress.layers import Layer

__all__ = [
    "LAMP",
    "APoZ",
    "BatchNormScale",
    "Criterion",
    "Magnitude",
    "MeanActivation",
    "Movement",
    "Random",
    "SparedMagnitude",
    "Taylor",
    "Wanda",
]


class Criterion(ABC):
    """Scores the weights of a layer; see :func:`lightning_compress.testing.check_criterion`.

    A criterion that looks at data overrides ``observe`` or ``observe_gradient``: what they return is averaged over the
    batches of the normal training and stands in ``layer.seen`` when ``score`` is called.
    """

    memory: ClassVar[float] = 0.99
    """Weight of the previous average when a batch is added; 1 sums instead."""
    needs_norm: ClassVar[bool] = False
    """Whether ``score`` reads ``layer.norm``."""

    @abstractmethod
    def score(self, layer: Layer) -> Tensor:
        """One finite score per weight, in the weight's shape; higher = keep."""

    def score_values(self, weights: Tensor, out: Tensor) -> Tensor:
        """Scores of any stretch of weights, written into ``out``; only for a criterion that needs no more than values.

        The score of 0 must then be 0 and the lowest. Such scores are never held for a whole model.
        """
        raise TypeError(f"{type(self).__name__} scores whole layers")

    def observe(self, layer: Layer, inputs: Tensor, activations: Tensor) -> Tensor:
        """What to remember of a batch.

        Args:
            layer: The layer.
            inputs: What the layer read.
            activations: What came out behind the batch norm and the activation function that follow the layer, if any.
        """
        raise TypeError(f"{type(self).__name__} observes no activations")

    def observe_gradient(self, layer: Layer, gradient: Tensor) -> Tensor:
        """What to remember of an optimizer step; ``gradient`` is the weight's."""
        raise TypeError(f"{type(self).__name__} observes no gradients")

    def refuses(self, layer: Layer) -> str | None:
        """Why the layer cannot be scored; None where it can."""
        is_called = not layer.axes and isinstance(layer.module, nn.Linear | nn.modules.conv._ConvNd)
        if self.observes_activations and not is_called:
            kind = type(layer.module).__name__
            return f"{type(self).__name__} observes linear and convolution layers, and this is a weight of {kind}"
        return None

    @property
    def needs_data(self) -> bool:
        """Whether the criterion looks at more than weights."""
        return self.observes_activations or self.observes_gradients or self.needs_norm

    @property
    def observes_activations(self) -> bool:
        """Whether inputs and outputs of the layers are wanted."""
        return type(self).observe is not Criterion.observe

    @property
    def observes_gradients(self) -> bool:
        """Whether gradients are wanted."""
        return type(self).observe_gradient is not Criterion.observe_gradient


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The size of the weight, |w| (Han 2015, arXiv:1506.02626).

    Example:
        >>> Magnitude().score(Layer("fc", torch.nn.Linear(3, 2))).shape
        torch.Size([2, 3])
    """

    def score(self, layer: Layer) -> Tensor:
        """The absolute weight."""
        return layer.weight.detach().abs()

    def score_values(self, weights: Tensor, out: Tensor) -> Tensor:
        """The absolute weights."""
        return torch.abs(weights, out=out)


@dataclass(frozen=True)
class SparedMagnitude(Criterion):
    """Magnitude that keeps as many weights of each layer as it has outputs: ranked globally, it empties none.

    Global magnitude drops thin layers whole at extreme sparsities; here the largest weights of every layer, one per
    output, rank above all others.

    Example:
        >>> layer = Layer("fc", torch.nn.Linear(2, 1))
        >>> _ = torch.nn.init.constant_(layer.weight, 2.0)
        >>> sorted(SparedMagnitude().score(layer).flatten().tolist())
        [2.0, 2000000.0]
    """

    def score(self, layer: Layer) -> Tensor:
        """|w|, far above all others for the largest of the layer."""
        scores = layer.weight.detach().abs()
        flat = scores.view(-1) if scores.is_contiguous() else scores.flatten()
        flat[flat.topk(min(flat.numel(), layer.weight.shape[layer.out_axis])).indices] *= 1e6
        return flat.view_as(layer.weight)


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform noise, the floor that every criterion must beat; the same for the same seed and layer name.

    Args:
        seed: Seed of the noise.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_number("Random.seed", self.seed, "a whole number from 0", low=0)

    def score(self, layer: Layer) -> Tensor:
        """Uniform in 0..1, without touching the global random state."""
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {layer.name}".encode()))
        return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)


@dataclass(frozen=True)
class LAMP(Criterion):
    """Magnitude relative to the weights of the layer that are at least as large (Lee 2021, arXiv:2010.07611).

    w^2 / (sum of u^2 over all |u| >= |w|)^power. Ranked globally with power 1, it finds each layer's share by itself
    and empties none: the largest weight of every layer scores 1. Power 0 is the global magnitude; in between, thin
    layers are spared less.

    Args:
        power: How far each layer is measured by itself, 0..1.

    Raises:
        ValueError: If the power is out of range.

    Example:
        >>> layer = Layer("fc", torch.nn.Linear(2, 1))
        >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
        >>> LAMP().score(layer)
        tensor([[0.5000, 1.0000]])
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        check_number("LAMP.power", self.power, "a number in 0..1; 1 is the paper's score", low=0, high=1)

    def score(self, layer: Layer) -> Tensor:
        """At least 0, rising with |w|."""
        squares, order = layer.weight.detach().flatten().double().square().sort(stable=True)
        at_least = squares.flip(0).cumsum(0).flip(0).clamp(min=torch.finfo(torch.float64).tiny)
        scores = torch.empty_like(squares).scatter_(0, order, squares / at_least**self.power)
        return scores.view_as(layer.weight).float()


@dataclass(frozen=True)
class MeanActivation(Criterion):
    """Mean |a| of the neuron that a weight belongs to, over the batches of the normal training (Hu 2016's setting).

    All weights of a neuron score alike, so use it with the pattern ``Channel`` or in ``ChannelPruning``.

    Example:
        >>> layer = Layer("fc", torch.nn.Linear(3, 2), seen=torch.tensor([0.1, 2.0]))
        >>> MeanActivation().score(layer)
        tensor([[0.1000, 0.1000, 0.1000],
                [2.0000, 2.0000, 2.0000]])
    """

    def observe(self, layer: Layer, inputs: Tensor, activations: Tensor) -> Tensor:
        """Mean absolute activation, one per output channel."""
        return _by_channel(layer, activations.abs())

    def score(self, layer: Layer) -> Tensor:
        """The mean of its neuron, for every weight."""
        return _for_weights(layer, layer.seen, layer.spread_outputs)


@dataclass(frozen=True)
class APoZ(Criterion):
    """Share of the activations that are not zero: 1 - average percentage of zeros (Hu 2016, arXiv:1607.03250).

    Without an activation function behind the layer, what is not above 0 counts as zero. All weights of a neuron score
    alike, so use it with the pattern ``Channel`` or in ``ChannelPruning``.
    """

    def observe(self, layer: Layer, inputs: Tensor, activations: Tensor) -> Tensor:
        """Share of positive activations, one per output channel."""
        return _by_channel(layer, (activations > 0).to(activations.dtype))

    def score(self, layer: Layer) -> Tensor:
        """The share of its neuron, for every weight."""
        return _for_weights(layer, layer.seen, layer.spread_outputs)


@dataclass(frozen=True)
class Wanda(Criterion):
    """|w| times the root mean square of the input it multiplies (Sun 2023, arXiv:2306.11695).

    The paper ranks the weights of each output by itself; here ``scope`` says what is ranked together.
    """

    def observe(self, layer: Layer, inputs: Tensor, activations: Tensor) -> Tensor:
        """Mean square, one per input channel."""
        return _by_channel(layer, inputs.float().square())

    def score(self, layer: Layer) -> Tensor:
        """|w| * rms(x)."""
        return layer.weight.detach().abs() * _for_weights(layer, layer.seen, layer.spread_inputs).sqrt()


@dataclass(frozen=True)
class Taylor(Criterion):
    """First-order change of the loss when a weight goes, squared: (w g)^2 (Molchanov 2019, arXiv:1906.10771)."""

    def observe_gradient(self, layer: Layer, gradient: Tensor) -> Tensor:
        """(w g)^2."""
        return (layer.weight.detach() * gradient).square()

    def score(self, layer: Layer) -> Tensor:
        """The average over the steps."""
        return torch.zeros_like(layer.weight) if layer.seen is None else layer.seen


@dataclass(frozen=True)
class Movement(Criterion):
    """How far training moved a weight away from zero: -sum of w g (Sanh 2020, arXiv:2005.07683)."""

    memory: ClassVar[float] = 1.0

    def observe_gradient(self, layer: Layer, gradient: Tensor) -> Tensor:
        """-w g."""
        return -(layer.weight.detach() * gradient)

    def score(self, layer: Layer) -> Tensor:
        """The sum over the steps; negative for weights that shrink."""
        return torch.zeros_like(layer.weight) if layer.seen is None else layer.seen


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """|gamma| of the batch norm right behind the layer (Liu 2017, arXiv:1708.06519).

    All weights of a channel score alike, so use it with the pattern ``Channel`` or in ``ChannelPruning``.
    """

    needs_norm: ClassVar[bool] = True

    def refuses(self, layer: Layer) -> str | None:
        """Only convolution and linear layers have a batch norm behind them."""
        if layer.axes or not isinstance(layer.module, nn.Linear | nn.modules.conv._ConvNd):
            return f"no batch norm can follow a weight of {type(layer.module).__name__}"
        return None

    def score(self, layer: Layer) -> Tensor:
        """|gamma| of its channel, for every weight."""
        gamma = None if layer.norm is None else layer.norm._parameters["weight"]
        return _for_weights(layer, None if gamma is None else gamma.detach().abs(), layer.spread_outputs)


def _by_channel(layer: Layer, values: Tensor) -> Tensor:
    """Mean over all but the channels."""
    rows = values.movedim(layer.channel_axis, -1)
    return rows.reshape(-1, rows.shape[-1]).float().mean(0)


def _for_weights(layer: Layer, values: Tensor | None, spread: Callable[[Tensor], Tensor]) -> Tensor:
    """One value per channel, spread over the weight; zeros where nothing was seen."""
    if values is None:
        return torch.zeros_like(layer.weight)
    return spread(values.to(layer.weight)).expand_as(layer.weight).contiguous()
