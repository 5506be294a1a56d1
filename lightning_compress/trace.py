"""What happened in one watched batch, as plain data: calls of modules, torch functions, the values between them.

:class:`lightning_compress.watch.Watch` records a :class:`Trace` without capturing a graph. Whatever is concluded is a
function of it: where activations are quantized, which norm follows a layer, between which layers scales can be moved.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_compress.functions import LAYERS

__all__ = ["Began", "Ended", "Event", "Ran", "Trace", "Value", "find_norms", "ran"]


@dataclass(frozen=True)
class Value:
    """What a tensor holds between two writes: written in place, the tensor holds another value.

    Args:
        number: Of this value alone in its trace, also after the tensor is gone and its id is another's.
        shape: The tensor's; -1 per axis where it has none.
        dtype: The tensor's.
        is_parameter: Whether the tensor is an ``nn.Parameter``.
    """

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool


@dataclass(frozen=True)
class Began:
    """A module is called.

    Args:
        name: The module's name.
        args: Its positional arguments; None for what is no tensor. A packed sequence stands as the tensor in it.
        kwargs: Its arguments by name, likewise.
    """

    name: str
    args: tuple[Value | None, ...]
    kwargs: dict[str, Value | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """The last call that began has ended.

    Args:
        name: The module's name.
        args: Its positional arguments as they were when the call began.
        output: What it returned, where that is a tensor.
        outputs: All tensors in what it returned; none where it raised.
    """

    name: str
    args: tuple[Value | None, ...]
    output: Value | None
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Ran:
    """A torch function ran.

    Args:
        name: The function's name without the underscores around it.
        args: Its positional arguments, with a :class:`Value` in the place of each tensor.
        kwargs: Its arguments by name, likewise.
        reads: The tensors among the arguments, once for each time that they occur.
        results: The tensors that it returned. One that is among the arguments was written: it has a new number here.
        attribute: Where the function is ``get``, the attribute that was asked for, such as ``T``.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[Value, ...]
    results: tuple[Value, ...]
    attribute: str = ""


Event = Began | Ended | Ran


@dataclass
class Trace:
    """What happened while a model was watched.

    Args:
        events: In the order in which they happened; calls of modules are nested.
        tensors: Number of each parameter and buffer when the watch began, by its module's name and its own.
    """

    events: list[Event] = field(default_factory=list)
    tensors: dict[tuple[str, str], int] = field(default_factory=dict)


def find_norms(trace: Trace, layers: Collection[str], norms: Collection[str]) -> tuple[dict[str, str], dict[int, str]]:
    """The batch norm right behind each layer.

    Args:
        trace: Of one batch.
        layers: Names of the modules that are taken for layers.
        norms: Names of the batch norms.

    Returns:
        The norm that read what a layer gave, by layer, the first where several did; and the layer by the number of each
        value that is its output or that of its norm.
    """
    norm_of: dict[str, str] = {}
    layer_of: dict[int, str] = {}
    for event in trace.events:
        if not isinstance(event, Ended) or event.output is None:
            continue
        if event.name in layers:
            layer_of[event.output.number] = event.name
        elif event.name in norms and event.args and event.args[0] is not None:
            layer = layer_of.get(event.args[0].number)
            if layer is not None and norm_of.setdefault(layer, event.name) == event.name:
                layer_of[event.output.number] = layer
    return norm_of, layer_of


def ran(trace: Trace) -> set[str]:
    """Names of the modules that ran in a trace, or whose weights a function read as a layer does."""
    owners: dict[int, set[str]] = {}
    for (module, _), number in trace.tensors.items():
        owners.setdefault(number, set()).add(module)
    found: set[str] = set()
    inside: list[str] = []
    for event in trace.events:
        if isinstance(event, Began):
            inside.append(event.name)
            found.add(event.name)
        elif isinstance(event, Ended):
            inside.pop()
        elif inside or event.name in LAYERS or event.name in ("embedding", "matmul", "einsum"):
            # else an optimizer's step, or an average of weights
            read = [owners[value.number] for value in event.reads if value.number in owners]
            # a weight of several modules is read by the one that runs
            found.update(*(names for names in read if not names & set(inside[-1:])))
    return found
