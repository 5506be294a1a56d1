"""Weights that a module computes whenever it runs, such as by a weight norm: what from, and what they come to.

============================================  ===============================  =========================
what computes the weight                      example                          computed from
============================================  ===============================  =========================
a parametrization of torch                    ``parametrizations.weight_norm``  the original of its shape
a hook of torch                               ``weight_norm``, ``prune``       ``weight_v``, ``weight_orig``
a forward of the module's own                 weight standardization           ``weight``
============================================  ===============================  =========================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lightning_compress.copies import copy_module
from lightning_compress.functions import LAYERS

__all__ = ["ComputedWeights", "computed_weight", "has_own_forward", "keeps_zeros", "source_of"]
__all__ += ["store_weight", "takes_empty_rows"]

_KINDS = (nn.Linear, _ConvNd)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = [nn.Linear.forward, *(kind.forward for kind in _CONVOLUTIONS)]


def has_own_forward(module: nn.Module) -> bool:
    """Whether a linear layer or a convolution is of a class that says by itself how it is computed.

    Example:
        >>> has_own_forward(nn.Conv2d(1, 1, 3)), has_own_forward(nn.LazyConv2d(1, 3))
        (False, False)
    """
    kind = getattr(type(module), "_base", type(module))
    return isinstance(module, _KINDS) and kind.forward not in _FORWARDS


def source_of(module: nn.Module) -> str:
    """The parameter that a weight of torch's parametrizations or hooks is computed from; empty where there is none.

    Of several the one that has the weight's shape: of a weight norm the direction.

    Example:
        >>> source_of(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))), source_of(nn.Linear(3, 2))
        ('parametrizations.weight.original1', '')
    """
    if not isinstance(module, _KINDS) or module._parameters.get("weight") is not None:
        return ""
    names = [name for name, _ in module.named_parameters() if name.startswith("parametrizations.weight.original")]
    names += [name for name in module._parameters if name in ("weight_v", "weight_orig")]
    return next((name for name in names if module.get_parameter(name).shape == _shape(module)), "")


def _shape(module: Any) -> torch.Size:
    """The shape of the weight that the forward of a torch class multiplies by."""
    if isinstance(module, nn.Linear):
        return torch.Size([module.out_features, module.in_features])
    sizes = [module.out_channels, module.in_channels]
    first, second = reversed(sizes) if module.transposed else sizes
    return torch.Size([first, second // module.groups, *module.kernel_size])


@torch.no_grad()
def computed_weight(module: Any, source: str) -> Tensor:
    """The weight that a module multiplies by.

    Args:
        module: A linear layer or a convolution; one with a forward of its own is run on a copy.
        source: The parameter that it is computed from.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        >>> torch.equal(computed_weight(layer, "parametrizations.weight.original1"), layer.weight)
        True
    """
    with _as_evaluated(module):
        if source.startswith("parametrizations."):
            return module.parametrizations["weight"]().detach()
        if source != "weight":
            for hook in module._forward_pre_hooks.values():
                if _is_of_torch(hook):
                    hook(module, ())
            return module.__dict__["weight"].detach()
    return _of_own_forward(module)


def _of_own_forward(module: Any) -> Tensor:
    """What a copy of a module multiplies zeros by."""
    seen: list[Tensor] = []

    def note(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight

    copied: Any = copy_module(module)
    copied.__class__ = getattr(type(copied), "_base", type(copied))
    copied.eval()
    shape = copied.weight.shape
    if isinstance(copied, nn.Linear):
        x = torch.zeros(1, copied.in_features)
    else:  # of the kernel's own size and more, so that any padding fits
        sizes = [2 * dilation * size for size, dilation in zip(copied.kernel_size, copied.dilation, strict=True)]
        x = torch.zeros(1, copied.in_channels, *sizes)
    with torch.random.fork_rng(devices=[]), ComputedWeights(note, shape):
        copied.forward(x.to(copied.weight))
    return seen[0].detach().clone()


@contextmanager
def _as_evaluated(module: nn.Module) -> Iterator[None]:
    """Nothing that is computed moves what it is computed with, as a spectral norm does in training."""
    training = [m for m in module.modules() if m.training]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True


def keeps_zeros(module: nn.Module, source: str) -> bool:
    """Whether a weight is zero wherever the parameter is zero that it is computed from, whatever the values are.

    Example:
        >>> norms = nn.utils.parametrizations
        >>> layers = norms.weight_norm(nn.Linear(4, 4)), norms.orthogonal(nn.Linear(4, 4))
        >>> [keeps_zeros(layer, source_of(layer)) for layer in layers]
        [True, False]
    """
    zeros = torch.rand(module.get_parameter(source).shape, generator=torch.Generator().manual_seed(0)) < _SOME
    weight = _with_zeros(module, source, zeros)
    if weight is None:
        return False
    told = weight[zeros]
    told = told[torch.isfinite(told)]  # a norm divides by the length of what may be empty
    return told.numel() > 0 and not told.any()


def takes_empty_rows(module: nn.Module, source: str) -> bool:
    """Whether a weight is finite where the first row of the parameter is zero that it is computed from.

    Example:
        >>> norms = nn.utils.parametrizations
        >>> layers = norms.weight_norm(nn.Linear(4, 4)), norms.spectral_norm(nn.Linear(4, 4))
        >>> [takes_empty_rows(layer, source_of(layer)) for layer in layers]
        [False, True]
    """
    zeros = torch.zeros(module.get_parameter(source).shape, dtype=torch.bool)
    zeros[0] = True
    weight = _with_zeros(module, source, zeros)
    return weight is not None and bool(torch.isfinite(weight).all())


_SOME = 0.5


@torch.no_grad()
def _with_zeros(module: nn.Module, source: str, zeros: Tensor) -> Tensor | None:
    """What a copy computes of numbers that are alike in every state of training; None where it raises."""
    generator = torch.Generator().manual_seed(0)
    try:
        copied = copy_module(module).cpu()
        for parameter in copied.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        copied.get_parameter(source)[zeros] = 0
        return computed_weight(copied, source)
    except Exception:  # whatever the code of a module raises
        return None


def store_weight(module: Any) -> None:
    """Let a copy that ships hold the weight that torch's parametrizations or hooks compute, in place of what from.

    Where other tensors of the module are computed, too, it stays as it is.
    """
    source = source_of(module)
    others = module._modules["parametrizations"] if source.startswith("parametrizations.") else {"weight": None}
    if not source or list(others) != ["weight"]:
        return
    weight = nn.Parameter(computed_weight(module, source).clone())
    if "." in source:
        # torch's own function would take the weight from the class, which other copies share
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    else:
        for key in [k for k, hook in module._forward_pre_hooks.items() if _is_of_torch(hook)]:
            del module._forward_pre_hooks[key]
        for name in ("weight_v", "weight_g", "weight_orig"):
            module._parameters.pop(name, None)
        del module.__dict__["weight"]
    module._parameters["weight"] = weight


def _is_of_torch(hook: object) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils")


class ComputedWeights(TorchFunctionMode):
    """Changes the weights of one shape that linear layers and convolutions are called with.

    Args:
        change: Gives what is multiplied by instead.
        shape: The shape of the weight; a module may multiply by others, too, as an adapter does.
    """

    def __init__(self, change: Callable[[Tensor], Tensor], shape: torch.Size) -> None:
        super().__init__()
        self._change = change
        self._shape = shape

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, if it is a layer's with another weight."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").strip("_") in LAYERS:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            if weight.shape == self._shape:
                changed = self._change(weight)
                if "weight" in kwargs:
                    kwargs = {**kwargs, "weight": changed}
                else:
                    args = (args[0], changed, *args[2:])
        return func(*args, **kwargs)
