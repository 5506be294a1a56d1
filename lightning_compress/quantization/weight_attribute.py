"""What the attribute ``weight`` of a quantized layer is: quantized values to compute with, the stored ones to write to.

Code that knows nothing of a quantization reads a layer's weight to multiply by it, which has to give quantized values,
and also writes to it: it merges an adapter, clips a norm, initializes anew, freezes. What it writes goes to the
parameter, and what it asks of a parameter (``data``, ``grad``, ``requires_grad``, hooks) is answered by the parameter.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["with_writes_to"]


def with_writes_to(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """The values, of which all that is done in place is done to the parameter that they were computed from.

    Args:
        parameter: What is stored.
        values: What is computed with, of the same shape.

    Example:
        >>> weight = nn.Parameter(torch.tensor([0.3, 0.8]))
        >>> rounded = with_writes_to(weight, weight.round())
        >>> rounded.data += 1
        >>> (rounded * 2).tolist(), weight.tolist()
        ([0.0, 2.0], [1.2999999523162842, 1.7999999523162842])
    """
    if values is parameter or torch.compiler.is_compiling():
        return values
    made = values.as_subclass(_Weight)
    made.__dict__["_stored"] = parameter
    return made


class _Weight(Tensor):
    """Multiplies like any tensor; nothing that is computed from it is one of these."""

    # as torch documents for subclasses
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001
    _stored: nn.Parameter

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved and sent as its values."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copied as the parameter that it shows."""
        return copy.deepcopy(self._stored, memo)


def _asked(name: str) -> property:
    return property(lambda self: getattr(self._stored, name), lambda self, value: setattr(self._stored, name, value))


def _done(name: str) -> Any:
    return lambda self, *args, **kwargs: getattr(self._stored, name)(*args, **kwargs)


def _in_place(name: str) -> bool:
    """Whether a method of tensors changes them, such as ``add_``, ``+=`` and ``x[0] = 1``."""
    if name.startswith("_"):
        return name == "__setitem__" or (name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"))
    return name.endswith("_") and name != "detach_"  # which is of a graph, and not of values


for _name in ("data", "grad", "requires_grad"):
    setattr(_Weight, _name, _asked(_name))
for _name in [*filter(_in_place, dir(Tensor)), "register_hook", "register_post_accumulate_grad_hook"]:
    setattr(_Weight, _name, _done(_name))
