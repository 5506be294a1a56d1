"""Where: the layers a method works on, picked by kind and by name pattern.

A weight is a layer when the model multiplies by it. Of torch's own modules that is known; of raw parameters it is known
once a step was watched, and :func:`know` has noted it (see :mod:`lightning_compress.multiplied`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_compress.computed import has_own_forward, source_of
from lightning_compress.layer import EMBEDDING, PRUNABLE, QUANTIZABLE, Layer

__all__ = ["EMBEDDING", "PRUNABLE", "QUANTIZABLE", "Layer", "find_layers", "matches", "modules_by_name"]
__all__ += ["check_patterns", "every_weight", "know", "known", "plain_name", "raw_parameters"]
__all__ += ["weights_in_own_forwards"]

_KNOWN = "_compress_multiplied"
_OF_MANY = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)  # with several weights, each under its own name


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
    watched = known(model)
    for layer in every_weight(model):
        name = layer.name
        kind = type(layer.module).__name__
        weight = layer.weight if layer.source else layer.module._parameters.get(layer.parameter)
        named = bool(include) and matches(name, include)
        if not layer.axes and not isinstance(layer.module, QUANTIZABLE):
            why = "by which no step multiplies" if name in watched else "which is not a kind of layer known here"
            skipped[name] = f"a raw parameter of {kind}, {why}"
        elif weight is None:
            skipped[name] = "its weight is computed by code that does not tell from which parameter"
        elif isinstance(weight, nn.UninitializedParameter):
            skipped[name] = "a lazy layer that has no shape yet; call the model once before training"
        elif weight.numel() == 0:
            skipped[name] = f"its weight is empty, of shape {tuple(weight.shape)}"
        elif matches(name, exclude):
            skipped[name] = "excluded by name"
        elif include and not named:
            skipped[name] = "not included by name"
        elif not (nn.Linear in kinds if layer.axes else isinstance(layer.module, kinds)) and not named:
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


def know(model: nn.Module, axes: Mapping[str, str]) -> None:
    """Note by which raw parameters a model multiplies: from now on they are layers.

    Args:
        model: The model; its copies know it, too, and ``state_dict`` does not hold it.
        axes: What each axis is (see :class:`Layer`), by the parameter's name; empty for one that no step multiplies by
            as it is stored.

    Example:
        >>> model = nn.ParameterDict({"w": torch.randn(3, 2)})
        >>> know(model, {"w": "io"})
        >>> [(layer.name, layer.out_axis) for layer in find_layers(model)[0]]
        [('w', 1)]
    """
    model.__dict__[_KNOWN] = {**known(model), **axes}


def known(model: nn.Module) -> dict[str, str]:
    """What :func:`know` has noted: the axes of each raw parameter by its name."""
    return getattr(model, "_orig_mod", model).__dict__.get(_KNOWN, {})


def raw_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of two or more axes, by name, of which no class of module says whether they are layers."""
    return {
        f"{name}.{key}" if name else key: value
        for name, module in modules_by_name(model).items()
        if not isinstance(module, nn.utils.parametrize.ParametrizationList)
        for key, value in module._parameters.items()
        if not _is_of_class(module, key) and isinstance(value, Tensor) and not torch.nn.parameter.is_lazy(value)
        if value.dim() >= 2 and value.is_floating_point()
    }


def weights_in_own_forwards(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers and convolutions, by name, of which a forward of their own may compute others."""
    found: dict[str, nn.Parameter] = {}
    for name, module in modules_by_name(model).items():
        weight = module._parameters.get("weight")
        if weight is not None and has_own_forward(module):
            found[f"{name}.weight" if name else "weight"] = weight
    return found


def _is_of_class(module: nn.Module, key: str) -> bool:
    """Whether the class of a module says what one of its parameters is."""
    if isinstance(module, _OF_MANY):
        return True
    if key.startswith("weight_") and source_of(module):  # what its weight is computed from
        return True
    return isinstance(module, QUANTIZABLE) and key in ("weight", "bias")


def every_weight(model: nn.Module) -> Iterator[Layer]:
    """Every weight of two or more axes, of known layers first-class and of other modules as they come."""
    axes = known(model)
    for name, module in modules_by_name(model).items():
        before = f"{name}." if name else ""
        is_simple = isinstance(module, QUANTIZABLE) and not isinstance(module, _OF_MANY)
        if is_simple:
            yield Layer(name or "weight", module, "weight", source=_source(module, axes.get(f"{before}weight")))
        for key, value in module._parameters.items():
            # of a class made from a known one, such as an adapter, only what is known to be a layer
            if _is_weight(module, key, value) and (axes.get(before + key) or not is_simple):
                yield Layer(before + key, module, key, axes=axes.get(before + key, ""))


def _source(module: nn.Module, axes: str | None) -> str:
    """The parameter that a weight is computed from, by torch or, as was watched, in the forward of the module's own."""
    return "weight" if axes == "" and has_own_forward(module) else source_of(module)


def _is_weight(module: nn.Module, key: str, value: nn.Parameter | None) -> bool:
    """Whether a parameter may be a weight that stands under its own name."""
    if isinstance(module, _OF_MANY):
        return "weight" in key and value is not None
    is_shown = isinstance(module, nn.utils.parametrize.ParametrizationList) or _is_of_class(module, key)
    return not is_shown and isinstance(value, Tensor) and value.dim() >= 2
