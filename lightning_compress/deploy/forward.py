"""The forward of a module, recorded and replaced: how a file is compared on a user's own validation step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["ForwardOnly", "Inputs", "record_inputs", "replaced_forward", "with_batch"]


class Inputs(NamedTuple):
    """Arguments of one call of a forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def batch_size(self) -> int:
        """Length of the first axis of the first tensor."""
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


def record_inputs(model: nn.Module, run: Callable[[], Any]) -> Inputs | None:
    """The arguments of the model's first call inside ``run``, which ends there; None if it makes no call."""
    found: list[Inputs] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        found.append(Inputs(*_detached((args, kwargs))))
        raise _Recorded

    with replaced_forward(model, forward), suppress(_Recorded):
        run()
    return found[0] if found else None


def with_batch(inputs: Inputs, batch_size: int) -> Inputs:
    """The inputs repeated or cut along their batch axis."""
    size = inputs.batch_size

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != size:
            return x
        return x.repeat(-(-batch_size // size), *[1] * (x.dim() - 1))[:batch_size].contiguous()

    return Inputs(*tree_map(resize, tuple(inputs)))


def _detached(values: Any) -> Any:
    return tree_map(lambda x: x.detach().cpu().clone() if isinstance(x, Tensor) else x, values)


class ForwardOnly(nn.Module):
    """A plain module around a model's forward, free of the Trainer, for capture by an exporter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model.forward(*args, **kwargs)


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """The outputs of a model in eval mode, without gradients."""
    with torch.no_grad():
        return model(*inputs.args, **inputs.kwargs)
