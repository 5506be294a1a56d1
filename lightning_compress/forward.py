"""The forward of a module, recorded and replaced: how a file is compared on a user's own validation step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["ForwardOnly", "Inputs", "input_names", "record_inputs", "replaced_forward", "run_model", "with_batch"]


class Inputs(NamedTuple):
    """Arguments of one call of a forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def batch_size(self) -> int:
        """Length of the first axis of the first tensor that has one; 1 without such a tensor."""
        return next((x.shape[0] for x in tree_leaves(tuple(self)) if isinstance(x, Tensor) and x.dim()), 1)


class _Recorded(Exception):
    pass


@contextmanager
def replaced_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``model(...)`` call another function."""
    before = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if before is not None:
            model.__dict__["forward"] = before


# No lightning_compress.watch.Watch: that one holds no values, and lets the batch run to its end.
def record_inputs(model: nn.Module, run: Callable[[], Any]) -> Inputs | None:
    """The arguments of the model's first call inside ``run``, which ends there; None if it makes no call.

    Args:
        model: The model.
        run: Calls it, such as a validation step.

    Returns:
        The arguments, detached, copied and on the CPU.
    """
    found: list[Inputs] = []

    def forward(*args: object, **kwargs: object) -> Any:
        found.append(Inputs(*_detached((args, kwargs))))
        raise _Recorded

    with replaced_forward(model, forward), suppress(_Recorded):
        run()
    return found[0] if found else None


def with_batch(inputs: Inputs, batch_size: int) -> Inputs:
    """The inputs repeated or cut along their batch axis, the first one.

    Example:
        >>> with_batch(Inputs((torch.tensor([1, 2, 3]),), {}), 5)
        Inputs(args=(tensor([1, 2, 3, 1, 2]),), kwargs={})
    """
    size = inputs.batch_size

    def resize(x: object) -> Any:
        # what has another length, such as a mask over positions, is no batch
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != size:
            return x
        return x.repeat(-(-batch_size // size), *[1] * (x.dim() - 1))[:batch_size].contiguous()

    return Inputs(*tree_map(resize, tuple(inputs)))


def _detached(values: object) -> Any:
    return tree_map(lambda x: x.detach().cpu().clone() if isinstance(x, Tensor) else x, values)


class ForwardOnly(nn.Module):
    """A plain module around a model's forward, free of the Trainer, that takes the tensors of its arguments one by one.

    Args:
        model: The model.
        inputs: Arguments of its forward; what is no tensor in them is constant.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._structure = tree_flatten(tuple(inputs))

    def forward(self, *tensors: Tensor) -> Any:
        """The model's forward."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, Tensor) else x for x in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        return self.model.forward(*args, **kwargs)


def input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """A name for each tensor among the arguments: the parameter's, numbered where it holds several."""
    parameters = list(signature(model.forward).parameters)
    parameters += [f"input_{i}" for i in range(len(parameters), len(inputs.args))]
    named = [*zip(parameters, inputs.args, strict=False), *inputs.kwargs.items()]
    names = []
    for name, value in named:
        if isinstance(value, Tensor):
            names.append(name)
        else:
            num = sum(isinstance(x, Tensor) for x in tree_leaves(value))
            names += [f"{name}_{i}" for i in range(num)]
    return names


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """The outputs of a model in eval mode, without gradients."""
    with torch.no_grad():
        return model(*inputs.args, **inputs.kwargs)
