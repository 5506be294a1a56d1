"""Where: the layers a method works on, picked by kind and by name pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

__all__ = ["EMBEDDING", "PRUNABLE", "QUANTIZABLE", "Layer", "find_layers", "matches", "modules_by_name"]
__all__ += ["check_patterns", "plain_name"]

_CONVOLUTION = (nn.modules.conv._ConvNd,)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
EMBEDDING: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)
PRUNABLE: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTION, nn.MultiheadAttention, *_RECURRENT)
QUANTIZABLE: tuple[type[nn.Module], ...] = (*PRUNABLE, *EMBEDDING)


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight that a method works on.

    Args:
        name: The module's name, with the parameter's name behind it where a module holds several weights.
        module: The module that holds the weight.
        parameter: Key of the weight in the module's parameters.
        seen: What a criterion observed of this layer during training, averaged.
        norm: The batch norm right behind the layer, where a criterion asked for it.
        whole: The weight gathered from all processes, where it is sharded and a criterion is to see all of it.
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    seen: Tensor | None = None
    norm: nn.Module | None = None
    whole: nn.Parameter | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The stored weight, whatever the module shows under that name."""
        weight = self.module._parameters[self.parameter] if self.whole is None else self.whole
        assert weight is not None
        return weight

    @property
    def gradient(self) -> Tensor | None:
        """Its gradient, detached; dense also where an embedding gives a sparse one."""
        gradient = self.weight.grad
        if gradient is None:
            return None
        return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()

    @property
    def module_name(self) -> str:
        """Name of the module that holds the weight: without the parameter's, where that stands in the layer's name."""
        if self.parameter == "weight" and isinstance(self.module, QUANTIZABLE):
            return self.name
        return self.name.removesuffix(self.parameter).removesuffix(".")

    @property
    def out_axis(self) -> int:
        """Axis of the output channels; of a grouped transposed convolution, of those of one group."""
        return 1 if getattr(self.module, "transposed", False) else 0

    @property
    def num_outputs(self) -> int:
        """Output channels: features of a linear layer, channels of a convolution, rows of any other weight."""
        return self.weight.shape[self.out_axis] * (self._groups if self.out_axis == 1 else 1)

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in a layer's inputs and outputs, counted from the end: a batch axis may be missing."""
        return 1 - self.weight.dim()

    def out_first(self, values: Tensor) -> Tensor:
        """A tensor of the weight's shape with its output channels first, or one like that back in the weight's shape.

        ============================  ===========================  ===========================
        layer                         weight                       output channels first
        ============================  ===========================  ===========================
        linear, recurrent, attention  (out, in)                    (out, in)
        convolution                   (out, in / groups, *kernel)  (out, in / groups, *kernel)
        transposed convolution        (in, out / groups, *kernel)  (out, in / groups, *kernel)
        ============================  ===========================  ===========================

        Example:
            >>> layer = Layer("up", nn.ConvTranspose1d(6, 4, 3, groups=2))
            >>> layer.weight.shape, layer.out_first(layer.weight).shape
            (torch.Size([6, 2, 3]), torch.Size([4, 3, 3]))
        """
        if self.out_axis == 0:
            return values
        return values.unflatten(0, (self._groups, -1)).transpose(1, 2).flatten(0, 1)

    def spread_outputs(self, values: Tensor) -> Tensor:
        """One value per output channel, in a shape that broadcasts against the weight.

        Example:
            >>> Layer("fc", nn.Linear(3, 2)).spread_outputs(torch.tensor([1.0, 2.0]))
            tensor([[1., 1., 1.],
                    [2., 2., 2.]])
        """
        return self._spread(values.view(-1, 1).expand(-1, self._num_columns))

    def spread_inputs(self, values: Tensor) -> Tensor:
        """One value per input channel, in a shape that broadcasts against the weight.

        Args:
            values: As many as the layer has inputs, or a divisor of that: behind a flatten, neighbouring inputs of a
                linear layer are of one channel.

        Example:
            >>> Layer("fc", nn.Linear(4, 1)).spread_inputs(torch.tensor([1.0, 2.0]))
            tensor([[1., 1., 2., 2.]])
        """
        each = values.repeat_interleave(self._num_columns * self._groups // len(values))
        rows = each.view(self._groups, 1, -1).expand(-1, self.num_outputs // self._groups, -1)
        return self._spread(rows.flatten(0, 1))

    @property
    def _groups(self) -> int:
        return getattr(self.module, "groups", 1)

    @property
    def _num_columns(self) -> int:
        """Inputs of one output channel, each with its kernel."""
        return self.weight.shape[1 - self.out_axis] // (self._groups if self.out_axis == 1 else 1)

    def _spread(self, values: Tensor) -> Tensor:
        """Values of shape (out, in / groups) as (rows, columns, 1, ...) of the weight."""
        stored = self.out_first(values)
        return stored.view(*stored.shape, *[1] * (self.weight.dim() - 2))


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every submodule by its name; the names are free of ``torch.compile``'s prefix."""
    return {plain_name(name): module for name, module in model.named_modules()}


def plain_name(name: str) -> str:
    """A name free of ``torch.compile``'s prefix.

    Example:
        >>> plain_name("_orig_mod.blocks.0._orig_mod.fc")
        'blocks.0.fc'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name equals a pattern, lies below it, or matches it as a glob.

    Example:
        >>> matches("encoder.0.conv", ["encoder"]), matches("encoder.0.conv", ["*.conv"]), matches("head", ["en*"])
        (True, True, False)
    """
    return any(name == p or name.startswith(p + ".") or fnmatchcase(name, p) for p in patterns)


def check_patterns(names: Sequence[str], **patterns: Sequence[str]) -> None:
    """Raise unless each pattern matches a layer.

    Args:
        names: The names of all layers.
        patterns: Name patterns by the argument that they were given as.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    for field, given in patterns.items():
        for pattern in given:
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(
                    f"{field}={pattern!r} matches no layer. The layers are: {', '.join(names) or 'none'}. "
                    "Give a name, a prefix of a name, or a glob such as 'encoder.*'."
                )


def find_layers(  # noqa: C901  # one branch per reason to leave a weight alone
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...] = PRUNABLE,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    skip_frozen: bool = False,
    skip_tied: bool = False,
) -> tuple[list[Layer], dict[str, str]]:
    """The weights of the given kinds of module, and what was left alone with the reason.

    Args:
        model: Any module.
        kinds: Module classes whose weights are taken.
        include: Name patterns; empty for all. A layer named here is taken even if it is frozen or an embedding.
        exclude: Name patterns of layers to leave alone.
        skip_frozen: Leave frozen weights alone.
        skip_tied: Take a weight that several modules share only once.

    Returns:
        The layers, in module order, and a dict of name to reason for every weight left alone.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    owners: dict[int, str] = {}
    for layer in _weights(model):
        name = layer.name
        kind = type(layer.module).__name__
        known = isinstance(layer.module, QUANTIZABLE)
        weight = layer.module._parameters.get(layer.parameter)
        named = bool(include) and matches(name, include)
        if not known:
            skipped[name] = f"a raw parameter of {kind}, which is not a kind of layer known here"
        elif weight is None:
            skipped[name] = "its weight is parametrized or computed by other code"
        elif isinstance(weight, nn.UninitializedParameter):
            skipped[name] = "a lazy layer that has no shape yet; call the model once before training"
        elif weight.numel() == 0:
            skipped[name] = f"its weight is empty, of shape {tuple(weight.shape)}"
        elif matches(name, exclude):
            skipped[name] = "excluded by name"
        elif include and not named:
            skipped[name] = "not included by name"
        elif not isinstance(layer.module, kinds) and not named:
            skipped[name] = f"{kind} is taken only when include names it"
        elif skip_frozen and not weight.requires_grad and not named:
            skipped[name] = "frozen (requires_grad=False); include it by name to take it"
        elif skip_tied and id(weight) in owners:
            skipped[name] = f"shares its weight with {owners[id(weight)]}"
        elif not torch.is_floating_point(weight):
            skipped[name] = f"its weight is {weight.dtype}, not floating point"
        else:
            owners[id(weight)] = name
            layers.append(layer)
    names = [layer.name for layer in layers] + list(skipped)
    check_patterns(names, include=include, exclude=exclude)
    return layers, skipped


def _weights(model: nn.Module) -> Iterator[Layer]:
    """Every weight of two or more axes, of known layers first-class and of other modules as they come."""
    for name, module in modules_by_name(model).items():
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase):
            for key, value in module._parameters.items():
                if "weight" in key and value is not None:
                    yield Layer(f"{name}.{key}" if name else key, module, key)
        elif isinstance(module, QUANTIZABLE):
            yield Layer(name or "weight", module, "weight")
        elif not isinstance(module, nn.utils.parametrize.ParametrizationList):
            for key, value in module._parameters.items():
                if isinstance(value, Tensor) and value.dim() >= 2:
                    yield Layer(f"{name}.{key}" if name else key, module, key)
