"""Which raw parameters a model multiplies by, and what each of their axes is in the product.

A parameter is followed through whatever only moves its values: a transpose, a view, a slice, a cast, the choice of an
expert. What it is multiplied by must come from data: a product of weights alone is another weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_compress.functions import LAYERS
from lightning_compress.layers import plain_name, raw_parameters, weights_in_own_forwards
from lightning_compress.moves import moved
from lightning_compress.trace import Ran, Trace, Value

__all__ = ["Product", "find_axes", "find_products"]

# Which two arguments a function multiplies, the second by the last axis of the first.
_MATRICES = {
    **dict.fromkeys(("matmul", "linalg_matmul", "mm", "bmm", "mv", "grouped_mm", "grouped_mm_fallback"), (0, 1)),
    **dict.fromkeys(("sparse_mm", "spmm", "smm", "dsmm"), (0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "addbmm", "addmv"), (1, 2)),
    "rmatmul": (1, 0),
}
_GROUPS = 6  # the argument of a transposed convolution


@dataclass(frozen=True)
class Product:
    """A multiplication by a parameter.

    Args:
        name: The parameter's name.
        axes: What each of its axes is, as in :class:`lightning_compress.layer.Layer`.
        by: What it is multiplied by.
    """

    name: str
    axes: str
    by: Value


@dataclass(frozen=True)
class _View:
    """A value that holds a parameter's values and no others: which axes of it each axis comes from."""

    name: str
    num_axes: int
    sources: tuple[frozenset[int], ...]


def find_axes(model: nn.Module, traces: Iterable[Trace]) -> dict[str, str]:
    """What each axis of each raw parameter is, by name; empty for those that no trace multiplies by.

    So are weights of layers that read them in a forward of their own: empty where it computes others from them.

    Args:
        model: The model that was watched, or one of the same names.
        traces: Of its steps.

    Example:
        >>> import torch
        >>> from lightning_compress.watch import Watch
        >>> model = nn.ParameterDict({"w": torch.randn(3, 2), "shift": torch.randn(1, 2)})
        >>> with Watch(model) as watch:
        ...     y = torch.randn(5, 3) @ model["w"] + model["shift"]
        >>> find_axes(model, [watch.trace])
        {'shift': '', 'w': 'io'}
    """
    raw = raw_parameters(model)
    own = weights_in_own_forwards(model)
    axes = dict.fromkeys(raw, "")
    for trace in traces:
        numbers = {number for event in trace.events if isinstance(event, Ran) for number in _numbers(event)}
        axes |= {name: axes.get(name, "") for name in own if trace.tensors[_split(name)] in numbers}
        for products in find_products(trace, model, raw | own).values():
            for product in products:
                axes[product.name] = axes[product.name] or product.axes
    return axes


def _split(name: str) -> tuple[str, str]:
    module, _, key = name.rpartition(".")
    return module, key


def _numbers(event: Ran) -> list[int]:
    return [value.number for value in event.reads]


def find_products(
    trace: Trace, model: nn.Module, raw: Mapping[str, nn.Parameter] | None = None
) -> dict[int, list[Product]]:
    """The multiplications by raw parameters, by the index of the event.

    Args:
        trace: Of a step of the model.
        model: The model.
        raw: The parameters by name; of all that no class tells of by default.
    """
    raw = raw_parameters(model) if raw is None else raw
    parameters = {plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    views: dict[int, list[_View]] = {}
    fixed: set[int] = set()  # what is computed from parameters alone
    for (module, key), number in trace.tensors.items():
        name = f"{module}.{key}" if module else key
        if name in parameters:
            fixed.add(number)
        if name in raw:
            own = tuple(frozenset([axis]) for axis in range(raw[name].dim()))
            views.setdefault(number, []).append(_View(name, len(own), own))
    found: dict[int, list[Product]] = {}
    for time, event in enumerate(trace.events):
        if not isinstance(event, Ran) or not event.results:
            continue
        if event.reads and all(value.number in fixed for value in event.reads):
            fixed |= {value.number for value in event.results}
        products = list(_products(event, views, fixed))
        if products:
            found[time] = products
        of_first = views.get(event.reads[0].number, []) if event.reads else []
        for result, sources in zip(event.results, moved(event), strict=True) if of_first else ():
            if sources is not None:
                views[result.number] = [_through(view, sources) for view in of_first]
                fixed.add(result.number)
    return found


def _through(view: _View, sources: Sequence[frozenset[int]]) -> _View:
    """A view of a view."""
    axes = tuple(frozenset(axis for i in each for axis in view.sources[i]) for each in sources)
    return _View(view.name, view.num_axes, axes)


def _products(event: Ran, views: dict[int, list[_View]], fixed: set[int]) -> Iterable[Product]:
    for weight, roles, others in _weights(event):
        data = [value for value in others if value.number not in fixed]
        for view in views.get(weight.number, []) if data else []:
            axes = _axes(view, roles)
            if "i" in axes and ("o" in axes or "e" in axes):
                yield Product(view.name, axes, data[0])


def _axes(view: _View, roles: str) -> str:
    """What each axis of the parameter is; one that an index took a single place of holds weights side by side."""
    of_axis: dict[int, set[str]] = {}
    for role, sources in zip(roles, view.sources, strict=True):
        for axis in sources:
            of_axis.setdefault(axis, set()).add(role)
    return "".join(min(of_axis.get(axis, {"e"}), key="oike".index) for axis in range(view.num_axes))


def _weights(event: Ran) -> Iterable[tuple[Value, str, list[Value]]]:
    """Each operand of a multiplication, what its axes are if it is the weight, and what it is multiplied by."""
    operands = [*event.args, *event.kwargs.values()]
    values = [x for x in operands if isinstance(x, Value)]
    if event.name in LAYERS and len(values) > 1 and _is_plain(event):
        x, weight = event.kwargs.get("input", values[0]), event.kwargs.get("weight", values[1])
        axes = "io" if "transpose" in event.name else "oi"
        yield weight, axes + "k" * (len(weight.shape) - 2) if len(weight.shape) > 1 else "i", [x]
    elif event.name == "bilinear" and len(values) > 2:
        yield values[2], "oii", values[:2]
    elif event.name == "einsum" and isinstance(operands[0], str):
        yield from _einsum(operands[0], operands[1:])
    elif event.name in _MATRICES:
        first, second = (operands[i] if i < len(operands) else None for i in _MATRICES[event.name])
        if isinstance(first, Value) and isinstance(second, Value):
            yield second, _side_by_side(second, "io" if len(second.shape) > 1 else "i"), [first]
            yield first, _side_by_side(first, "oi" if len(first.shape) > 1 else "i"), [second]


def _is_plain(event: Ran) -> bool:
    """Whether the second axis of a transposed convolution holds all outputs, and not those of one group."""
    groups = event.kwargs.get("groups", event.args[_GROUPS] if len(event.args) > _GROUPS else 1)
    return "transpose" not in event.name or groups == 1


def _side_by_side(weight: Value, roles: str) -> str:
    return "e" * (len(weight.shape) - len(roles)) + roles


def _einsum(equation: str, given: Sequence[object]) -> Iterable[tuple[Value, str, list[Value]]]:
    listed = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    operands = [x for x in listed if isinstance(x, Value)]
    terms, _, result = equation.replace(" ", "").partition("->")
    names = [term.replace("...", ".") for term in terms.split(",")]
    if len(names) != len(operands):
        return
    if "->" not in equation:
        every = "".join(names)
        result = "".join(sorted(letter for letter in set(every) if every.count(letter) == 1 or letter == "."))
    result = result.replace("...", ".")
    for i, weight in enumerate(operands):
        others = "".join(names[:i] + names[i + 1 :])
        hidden = len(weight.shape) - len(names[i].replace(".", ""))
        letters = names[i].replace(".", "." * hidden)
        roles = "".join(_role(letter in result, letter in others) for letter in letters)
        if len(roles) == len(weight.shape):
            yield weight, roles, [x for k, x in enumerate(operands) if k != i]


def _role(in_result: bool, in_others: bool) -> str:
    if in_result:
        return "e" if in_others else "o"
    return "i" if in_others else "k"
