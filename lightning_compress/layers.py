"""Where: the layers a method works on, picked by kind and by name pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

__all__ = ["EMBEDDING", "PRUNABLE", "QUANTIZABLE", "Layer", "find_layers", "matches", "modules_by_name"]

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
    def out_axis(self) -> int:
        """Axis of the output channels."""
        return 1 if getattr(self.module, "transposed", False) else 0


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every submodule by its name; the names are free of ``torch.compile``'s prefix."""
    return {".".join(part for part in n.split(".") if part != "_orig_mod"): m for n, m in model.named_modules()}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name equals a pattern, lies below it, or matches it as a glob.

    Example:
        >>> matches("encoder.0.conv", ["encoder"]), matches("encoder.0.conv", ["*.conv"]), matches("head", ["en*"])
        (True, True, False)
    """
    return any(name == p or name.startswith(p + ".") or fnmatchcase(name, p) for p in patterns)


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
        name, kind = layer.name, type(layer.module).__name__
        known = isinstance(layer.module, QUANTIZABLE)
        weight = layer.module._parameters.get(layer.parameter)
        named = bool(include) and matches(name, include)
        if not known:
            skipped[name] = f"a raw parameter of {kind}, which is not a kind of layer known here"
        elif weight is None:
            skipped[name] = "its weight is parametrized or computed by other code"
        elif isinstance(weight, nn.UninitializedParameter):
            skipped[name] = "a lazy layer that has no shape yet; call the model once before training"
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
    for field, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(
                    f"{field}={pattern!r} matches no layer. The layers are: {', '.join(names) or 'none'}. "
                    "Give a name, a prefix of a name, or a glob such as 'encoder.*'."
                )
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
