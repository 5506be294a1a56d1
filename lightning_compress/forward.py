"""The forward of a module, recorded and replaced: how a file is compared on a user's own validation step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lightning_compress.checks import first_line
from lightning_compress.named import named_below, named_tensors

__all__ = [
    "ForwardOnly",
    "Inputs",
    "are_alike",
    "check_batch_axis",
    "detached",
    "fitting_batch",
    "input_names",
    "map_tensors",
    "record_inputs",
    "replaced_forward",
    "run_model",
    "tensors_in",
    "with_batch",
]


class Inputs(NamedTuple):
    """Arguments of one call of a forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def batch_size(self) -> int:
        """Length of the first axis of the first tensor that has one; 1 without such a tensor."""
        return next((x.shape[0] for x in tensors_in(tuple(self), (PackedSequence,)) if x.dim()), 1)


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
        found.append(detached(Inputs(args, kwargs)))
        raise _Recorded

    with replaced_forward(model, forward), suppress(_Recorded):
        run()
    # once more: what was copied in torch.inference_mode could never be traced
    return detached(found[0]) if found else None


def map_tensors(change: Callable[[Tensor], Any], values: Any, whole: tuple[type, ...] = ()) -> Any:
    """Values with every tensor changed, in lists, tuples and dicts, named tuples and dataclasses; the rest is the same.

    Args:
        change: What becomes of a tensor.
        values: The values; they are left as they are.
        whole: What keeps its tensors.

    Example:
        >>> map_tensors(lambda x: x + 1, {"x": [torch.tensor(1), "one"]})
        {'x': [tensor(2), 'one']}
    """

    def of_leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return change(x)
        if not is_dataclass(x) or isinstance(x, type):
            return x
        changed = copy.copy(x)
        for field in fields(x):
            # also of one that is frozen
            object.__setattr__(changed, field.name, map_tensors(change, getattr(x, field.name), whole))
            if isinstance(changed, dict) and field.name in changed:  # one that is both, as in transformers
                dict.__setitem__(changed, field.name, getattr(changed, field.name))
        return changed

    return tree_map(of_leaf, values, is_leaf=lambda x: isinstance(x, whole))


def with_batch(inputs: Inputs, batch_size: int) -> Inputs:
    """The inputs repeated or cut along their batch axis, the first one.

    Example:
        >>> with_batch(Inputs((torch.tensor([1, 2, 3]),), {}), 5)
        Inputs(args=(tensor([1, 2, 3, 1, 2]),), kwargs={})
    """
    size = inputs.batch_size

    def resize(x: Tensor) -> Tensor:
        # what has another length, such as a mask over positions, is no batch, and a sparse matrix is one whole
        if x.layout != torch.strided or not x.dim() or x.shape[0] != size:
            return x
        return x.repeat(-(-batch_size // size), *[1] * (x.dim() - 1))[:batch_size].contiguous()

    return Inputs(*map_tensors(resize, tuple(inputs), whole=(PackedSequence,)))


def fitting_batch(model: nn.Module, inputs: Inputs, batch_size: int) -> Inputs:
    """The inputs with another batch size, as they are where the model then fails: their first axis is no batch.

    Args:
        model: In eval mode, on the inputs' device.
        inputs: Its inputs.
        batch_size: How many samples.
    """
    resized = with_batch(inputs, batch_size)
    try:
        run_model(model, resized)
    except Exception:  # nodes of a graph that its edges name, say
        return inputs
    return resized


def check_batch_axis(model: nn.Module, inputs: Inputs) -> None:
    """Refuse arguments that a file with a batch axis cannot take.

    Args:
        model: In eval mode, on the inputs' device.
        inputs: Its arguments.

    Raises:
        ValueError: If they hold tensors in objects, or cannot be cut along their first axis.
    """
    names = ", ".join([*(_kind_of(x) for x in inputs.args), *(f"{k}={_kind_of(x)}" for k, x in inputs.kwargs.items())])
    accepted = "Accepted are tensors, alone or in lists, tuples and dicts, whose first axis is the batch"
    tensors = tensors_in(tuple(inputs))
    if not tensors:
        raise ValueError(f"forward is called with ({names}), in which there is no tensor. {accepted}")
    if len(tensors) > len([x for x in tree_leaves(tuple(inputs)) if isinstance(x, Tensor)]):
        raise ValueError(f"forward is called with ({names}), in which an object holds tensors. {accepted}")
    if len(tensors) > len(tensors_in(tuple(inputs), (PackedSequence,))):
        raise ValueError(f"forward is called with ({names}), in which sequences are packed. {accepted}")
    try:
        run_model(model, inputs)
    except Exception:  # not for want of a batch axis
        return
    try:
        run_model(model, with_batch(inputs, 1))
    except Exception as error:
        raise ValueError(
            f"forward is called with ({names}), and fails on one sample of it ({first_line(error)}). {accepted}"
        ) from None


def are_alike(inputs: Inputs, example: Inputs, open_axes: Sequence[Collection[int]] = ()) -> bool:
    """Whether arguments differ from an example in nothing but the values and the batch size of their tensors.

    Args:
        inputs: The arguments.
        example: Those that they are compared with.
        open_axes: Of each tensor the other axes that may have any length.
    """
    leaves, structure = tree_flatten(tuple(inputs))
    others, expected = tree_flatten(tuple(example))
    if structure != expected:
        return False
    axes = iter(open_axes)
    for x, other in zip(leaves, others, strict=True):
        if isinstance(x, Tensor) and isinstance(other, Tensor):
            free = {0, *next(axes, ())}
            if x.dim() != other.dim() or any(x.shape[i] != other.shape[i] for i in range(x.dim()) if i not in free):
                return False
        elif type(x) is not type(other) or (isinstance(x, bool | int | float | str) and x != other):
            return False
    return True


def tensors_in(values: object, whole: tuple[type, ...] = ()) -> list[Tensor]:
    """The tensors that :func:`map_tensors` would change, in its order."""
    found: list[Tensor] = []

    def see(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(see, values, whole)
    return found


def _kind_of(value: object) -> str:
    """What an argument is, in few words."""
    if isinstance(value, Tensor):
        return f"{'' if value.layout == torch.strided else 'sparse '}tensor {tuple(value.shape)}"
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return f"{type(value).__name__} of {', '.join(dict.fromkeys(map(_kind_of, value))) or 'nothing'}"
    return type(value).__name__ if value is not None else "None"


def detached(inputs: Inputs) -> Inputs:
    """A copy without gradients, on the CPU."""
    return Inputs(*map_tensors(lambda x: x.detach().cpu().clone(), tuple(inputs)))


class ForwardOnly(nn.Module):
    """A plain module around a model's forward, free of the Trainer, that takes the tensors of its arguments one by one.

    What it returns is what the model does, if that holds tensors alone; else the tensors in it, by their names.

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
        outputs = self.model.forward(*args, **kwargs)
        return outputs if _is_plain(outputs) else dict(named_tensors(outputs, "output"))


def _is_plain(values: object) -> bool:
    """Whether values are tensors, alone or in lists, tuples and dicts, and nothing else."""
    if type(values) in (list, tuple, dict):
        return all(map(_is_plain, values.values() if isinstance(values, dict) else values))  # type: ignore[call-overload]
    return isinstance(values, Tensor)


def input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """A name for each tensor among the arguments: the parameter's, with key or number where it holds several."""
    parameters = list(signature(model.forward).parameters)
    parameters += [f"input_{i}" for i in range(len(parameters), len(inputs.args))]
    named = [*zip(parameters, inputs.args, strict=False), *inputs.kwargs.items()]
    return [found for name, value in named for found, _ in named_below(value, (name,))]


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """The outputs of a model in eval mode, without gradients."""
    with torch.no_grad():
        return model(*inputs.args, **inputs.kwargs)
