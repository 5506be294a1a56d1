"""Values that torch functions make inside of a module's own forward, quantized where they are made.

A call site is named by its module, the function and how many calls of that function came before it in the same call of
the module: ``block:silu.1`` is the second ``silu`` in the forward of ``block``. Modules inside count for themselves, so
that the name stays where one of them is left out or changed. Of ``multi_head_attention_forward``, which is one function
for torch, what its last linear layer reads is quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.layers import modules_by_name
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize
from lightning_compress.watch import looking, same_value, unwatched

__all__ = ["CallSites", "attach_call_sites", "detach_call_sites", "is_call_site", "with_own_call_sites"]

_OUT_WEIGHT = list(signature(F.multi_head_attention_forward).parameters).index("out_proj_weight")


def is_call_site(place: str) -> bool:
    """Whether a place is a function's result rather than a module's input or output.

    Example:
        >>> is_call_site("block:silu.1"), is_call_site("block:output")
        (True, False)
    """
    return place.rpartition(":")[2] not in ("input", "output")


class CallSites(TorchFunctionMode):
    """Quantizes what functions give, while a module that has such a place runs; one for all modules of a model.

    Args:
        places: The quantizers by function and number, by the name of the module.
    """

    def __init__(self, places: Mapping[str, Mapping[str, ActivationFakeQuantize]]) -> None:
        super().__init__()
        self.places = places
        self.functions = {place.partition(".")[0] for sites in places.values() for place in sites}
        self.looks = True  # else what runs does not count
        self._calls: list[tuple[str, Mapping[str, ActivationFakeQuantize], Counter[str]]] = []

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: no call has begun."""
        return {**self.__dict__, "_calls": [], "looks": True}

    def begin(self, name: str, has_sites: bool = True) -> None:
        """A module is called; without sites where something else stands in for its forward."""
        if self._calls and not (name.startswith(self._calls[0][0]) or name == self._calls[0][0]):
            self._calls.clear()  # a call that was interrupted, as by a signal, has not ended
            self._close()
        # torch runs other kernels of attention while a mode is on: not in a model that computes in float
        if not self._calls and any(site.enabled or site.observing for site in self._sites()):
            self.__enter__()
            looking.append(self)
        self._calls.append((name, self.places.get(name, {}) if has_sites else {}, Counter()))

    def end(self, name: str) -> None:
        """Its call has ended; nothing happens where a hook of others raised before it began."""
        if self._calls and self._calls[-1][0] == name:
            self._calls.pop()
            if not self._calls:
                self._close()

    def _sites(self) -> Iterator[ActivationFakeQuantize]:
        return (site for sites in self.places.values() for site in sites.values())

    def _close(self) -> None:
        if self in looking:
            looking.remove(self)
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        site = self._site(getattr(func, "__name__", "").strip("_"))
        if site is None:
            return func(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return _attention(partial(_quantized, site))(*args, **(kwargs or {}))
        return _quantized(site, func(*args, **(kwargs or {})))

    def _site(self, name: str) -> ActivationFakeQuantize | None:
        """What quantizes the result of the function that is called, if anything does."""
        if not self._calls or not self.looks or name not in self.functions:
            return None
        _, sites, counts = self._calls[-1]
        counts[name] += 1
        return sites.get(f"{name}.{counts[name] - 1}")


def _quantized(site: ActivationFakeQuantize, x: Any) -> Any:
    y = unwatched(site.quantize, x)
    if isinstance(x, Tensor):
        same_value(x, y)
    return y


def _attention(quantize: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Torch's attention, with what its last linear layer reads quantized: a function of its own calls that layer."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(quantize(x) if weight is out_weight[0] else x, weight, bias)

    def attention(*args: Any, **kwargs: Any) -> Any:
        out_weight.append(kwargs["out_proj_weight"] if "out_proj_weight" in kwargs else args[_OUT_WEIGHT])
        return copied(*args, **kwargs)

    out_weight: list[Any] = []
    own = F.multi_head_attention_forward
    names = {**own.__globals__, "linear": linear}
    copied = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copied.__kwdefaults__ = own.__kwdefaults__
    # where another mode takes the call, it is to call this one
    names[own.__name__] = copied
    return attention


class _Begin:
    """A forward pre-hook."""

    def __init__(self, sites: CallSites, name: str) -> None:
        self.sites = sites
        self.name = name

    def __call__(self, module: nn.Module, args: object) -> None:
        own = module.__dict__.get("forward")
        # a wrapper such as DDP's runs the training step in the place of the forward, which is called from there
        self.sites.begin(self.name, own is None or getattr(own, "__func__", None) is type(module).forward)


class _End:
    """A forward hook, which is called also where the forward raised."""

    def __init__(self, sites: CallSites, name: str) -> None:
        self.sites = sites
        self.name = name

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        self.sites.end(self.name)


def attach_call_sites(model: nn.Module, activations: Mapping[str, ActivationFakeQuantize]) -> None:
    """Let the functions of a model's modules quantize what they give.

    Args:
        model: The model.
        activations: All its activation quantizers by place; those of modules are left to the modules' own hooks.
    """
    detach_call_sites(model)
    places: dict[str, dict[str, ActivationFakeQuantize]] = {}
    for place, activation in activations.items():
        if is_call_site(place):
            name, _, site = place.rpartition(":")
            places.setdefault(name, {})[site] = activation
    if not places:
        return
    sites = CallSites(places)
    for name, module in modules_by_name(model).items():
        # what runs in a module inside does not count for the one around it
        if any(name == around or not around or name.startswith(f"{around}.") for around in places):
            module.register_forward_pre_hook(_Begin(sites, name), prepend=True)
            module.register_forward_hook(_End(sites, name), always_call=True)


def detach_call_sites(model: nn.Module) -> None:
    """Take them off all modules of a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Begin | _End)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)  # noqa: SLF001  # torch has no public name for it


def with_own_call_sites(model: nn.Module) -> None:
    """Let the forward of a model itself quantize, too: exporters call it without the model's hooks."""
    begin = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Begin)), None)
    if begin is None or not begin.sites.places.get(begin.name):
        return
    forward = model.forward

    @wraps(forward)
    def quantizing(*args: Any, **kwargs: Any) -> Any:
        with _called(begin.sites, begin.name):
            return forward(*args, **kwargs)

    model.__dict__["forward"] = quantizing


@contextmanager
def _called(sites: CallSites, name: str) -> Iterator[None]:
    sites.begin(name)
    try:
        yield
    finally:
        sites.end(name)
