"""What a file takes and gives: which arguments and outputs of the forward, by which names, and which axes are open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import Parameter, signature
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.forward import (
    Inputs,
    input_names,
    map_tensors,
    run_model,
    tensors_in,
)
from lightning_compress.named import named_tensors

__all__ = ["Axes", "Taken", "axes_to_try", "batch_axes", "filled", "first_to_work", "output_names", "taken_by_file"]

Axes = tuple[dict[int, str], ...]
"""Of each input the axes that are open, with their names."""


Result = TypeVar("Result")


class Taken(NamedTuple):
    """What of a call a file takes, and what of the outputs it gives.

    Args:
        inputs: The arguments without the labels.
        labels: Names of the arguments that are left out.
        outputs: Positions of the file's outputs among the tensors that the model returns.
        lost: Names of the outputs that are left out with the labels: losses.
    """

    inputs: Inputs
    labels: tuple[str, ...] = ()
    outputs: tuple[int, ...] = ()
    lost: tuple[str, ...] = ()

    def of(self, model: nn.Module, inputs: Inputs) -> Inputs:
        """Another call's arguments without the labels."""
        for name in self.labels:
            inputs = _without(model, inputs, name)
        return inputs


def taken_by_file(model: nn.Module, inputs: Inputs) -> Taken:
    """The call without its labels: arguments without which the model returns all that it did but for losses.

    A loss is an output of one value. An argument stays whose absence changes anything else, or takes nothing away.

    Args:
        model: In eval mode, on the inputs' device.
        inputs: Arguments of its forward.

    Example:
        >>> class Net(nn.Linear):
        ...     def forward(self, x, labels=None):
        ...         y = super().forward(x)
        ...         return {"loss": None if labels is None else (y - labels).square().mean(), "logits": y}
        >>> taken = taken_by_file(Net(3, 2), Inputs((torch.ones(4, 3), torch.ones(4, 2)), {}))
        >>> taken.labels, taken.lost
        (('labels',), ('loss',))
    """
    outputs = named_tensors(run_model(model, inputs))
    kept = list(range(len(outputs)))
    labels: list[str] = []
    for name in _arguments(model, inputs):
        fewer = _without(model, inputs, name)
        try:
            rest = [x for _, x in named_tensors(run_model(model, fewer))]
        except Exception:  # it needs this argument
            continue
        found = _places(rest, [outputs[i][1] for i in kept])
        if found is not None:
            kept = [kept[i] for i in found]
            inputs = fewer
            labels.append(name)
    lost = tuple(name for i, (name, _) in enumerate(outputs) if i not in kept)
    return Taken(inputs, tuple(labels), tuple(kept), lost)


def _places(rest: list[Tensor], outputs: list[Tensor]) -> list[int] | None:
    """Where outputs stand among more of them; None if anything but losses is gone, or nothing."""
    places: list[int] = []
    for i, x in enumerate(outputs):
        if len(places) < len(rest) and _is_equal(x, rest[len(places)]):
            places.append(i)
        elif x.numel() != 1:
            return None
    return places if rest and len(places) == len(rest) < len(outputs) else None


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _arguments(model: nn.Module, inputs: Inputs) -> list[str]:
    """Names of the arguments that hold tensors and may be left out."""
    parameters = signature(model.forward).parameters
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    by_place = [p.name for p in parameters.values() if p.kind in kinds]
    given = {**dict(zip(by_place, inputs.args, strict=False)), **inputs.kwargs}
    needed = {p.name for p in parameters.values() if p.default is Parameter.empty}
    return [name for name, value in given.items() if name not in needed and tensors_in(value)]


def _without(model: nn.Module, inputs: Inputs, name: str) -> Inputs:
    """The arguments with the default of one of them."""
    if name in inputs.kwargs:
        return Inputs(inputs.args, {k: v for k, v in inputs.kwargs.items() if k != name})
    parameters = signature(model.forward).parameters
    if name not in parameters:
        return inputs
    place = list(parameters).index(name)
    args = [parameters[name].default if i == place else x for i, x in enumerate(inputs.args)]
    return Inputs(tuple(args), inputs.kwargs)


def batch_axes(inputs: Inputs) -> Axes:
    """The batch axis of each tensor that has one."""
    size = inputs.batch_size
    return tuple({0: "batch"} if x.dim() and x.shape[0] == size else {} for x in tensors_in(tuple(inputs)))


def axes_to_try(model: nn.Module, inputs: Inputs) -> Iterator[Axes]:
    """The open axes of the inputs: first with the sequences' axis, where there is one, then with the batch axis alone.

    A sequence's axis is the second or third of an input with two or three, such as tokens, features over time or a
    waveform, that the model takes one shorter, together with the axes of the same length in the other inputs.

    Args:
        model: In eval mode on the CPU.
        inputs: Arguments of its forward.
    """
    batch = batch_axes(inputs)
    sequence = _sequence_axes(model, inputs, batch)
    if any(sequence):
        yield tuple(a | b for a, b in zip(batch, sequence, strict=True))
    yield batch


def first_to_work(capture: Callable[[Axes], Result], tries: Iterable[Axes]) -> Result:
    """What is captured with the first open axes that code allows: other code makes a constant of a length.

    Raises:
        Exception: What the last try says.
    """
    *before, last = tries
    for axes in before:
        try:
            return capture(axes)
        except Exception:  # whatever the exporter says of code that asks for a length
            continue
    return capture(last)


def _sequence_axes(model: nn.Module, inputs: Inputs, batch: Axes) -> Axes:
    tensors = tensors_in(tuple(inputs))
    open_: tuple[dict[int, str], ...] = tuple({} for _ in tensors)
    candidates = dict.fromkeys(
        (axis, x.shape[axis])
        for x, first in zip(tensors, batch, strict=True)
        for axis in range(1, x.dim())
        if first and x.dim() <= 3 and x.shape[axis] > 2
    )
    for axis, length in candidates:
        same = [[i for i in _axes_of(x, axis) if x.shape[i] == length] for x in tensors]
        if any(i in axes for axes, known in zip(same, open_, strict=True) for i in known):
            continue
        if _runs_shorter(model, inputs, same):
            num = len({name for axes in open_ for name in axes.values()})
            for axes, known in zip(same, open_, strict=True):
                known.update(dict.fromkeys(axes, f"sequence_{num}" if num else "sequence"))
    return open_


def _axes_of(x: Tensor, axis: int) -> range:
    """Where a length may stand: in the same axis, or in any axis of a mask of pairs."""
    return range(axis, min(axis + 1, x.dim())) if x.dim() <= 3 else range(1, x.dim())


def _runs_shorter(model: nn.Module, inputs: Inputs, axes: list[list[int]]) -> bool:
    """Whether the model takes tensors that are one shorter in some axes, and returns as many, with as many axes."""
    given = iter(axes)

    def cut(x: Tensor) -> Tensor:
        for axis in next(given):
            x = x.narrow(axis, 0, x.shape[axis] - 1)
        return x.contiguous()

    try:
        before = tensors_in(run_model(model, inputs))
        after = tensors_in(run_model(model, Inputs(*map_tensors(cut, tuple(inputs)))))
    except Exception:  # whatever it says of such a length
        return False
    return [x.dim() for x in before] == [x.dim() for x in after]


def output_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """A name for each tensor that the model returns: its field's, and none of an input's."""
    taken = set(input_names(model, inputs))
    names = []
    for name, _ in named_tensors(run_model(model, inputs), "output"):
        while name in taken:
            name = f"{name}_out"
        taken.add(name)
        names.append(name)
    return names


def filled(values: Any, tensors: Sequence[Tensor]) -> Any:
    """Values with other tensors in them; what is no tensor stays.

    Args:
        values: What a model returned.
        tensors: Their tensors, in order.
    """
    given = iter(tensors)
    return map_tensors(lambda _: next(given), values)
