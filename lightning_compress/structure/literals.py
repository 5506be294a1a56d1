"""Which attributes of a user's modules say how large an axis is, so that they follow when the axis becomes smaller.

While a forward is followed, whole numbers in the attributes of modules are :class:`Marked`: they remember where they
come from, also through arithmetic, until they arrive in a torch function as the size of one of its axes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_compress.structure.axes import Axis
from lightning_compress.structure.rules.call import Axes

__all__ = ["Attribute", "Marked", "Use", "Uses", "follow_sizes", "marked"]

# whose sizes follow from the shapes of their weights
_KNOWN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    _NormBase,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
)
_KNOWN += (nn.MultiheadAttention, nn.RNNCellBase, nn.GroupNorm, nn.PReLU)


class Attribute(NamedTuple):
    """A number in an attribute.

    Args:
        module: The module's name.
        key: The attribute's name.
        place: Which of several numbers; -1 where the attribute is one number.
    """

    module: str
    key: str
    place: int = -1


# what is given the sizes of all axes of its result, in their order
_OF_ALL_AXES: tuple[str, ...] = (
    "view",
    "reshape",
    "expand",
    "broadcast_to",
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
)
_OF_ALL_AXES += ("new_zeros", "new_ones", "new_empty", "new_full")

# what is given the size of some of them
_OF_SOME_AXES: tuple[str, ...] = (
    "split",
    "split_with_sizes",
    "unsafe_split",
    "narrow",
    "getitem",
    "unflatten",
    "layer_norm",
    "rms_norm",
)
_OF_SOME_AXES += ("group_norm",)

Values = Mapping[Attribute, int]
Formula = Callable[[Values], int]


class Marked(int):
    """A whole number that knows the attributes it comes from, and how.

    Example:
        >>> width = Marked.of(64, Attribute("attention", "width"))
        >>> half = width // 2
        >>> half, half.formula({Attribute("attention", "width"): 32})
        (32, 16)
    """

    formula: Formula
    attributes: frozenset[Attribute]

    @classmethod
    def of(cls, value: int, attribute: Attribute) -> Marked:
        """The number that an attribute holds."""
        return cls._made(value, lambda values: values[attribute], frozenset([attribute]))

    @classmethod
    def _made(cls, value: int, formula: Formula, attributes: frozenset[Attribute]) -> Marked:
        made = cls(value)
        made.formula = formula
        made.attributes = attributes
        return made

    def __hash__(self) -> int:
        """Not that of the plain number: what caches results by sizes would give those of another attribute."""
        return hash((int(self), self.attributes))

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """A copy is a plain number."""
        return int, (int(self),)


def _arithmetic(function: Callable[[int, int], int], swapped: bool) -> Callable[[Marked, object], Any]:
    def apply(self: Marked, other: object) -> Any:
        if type(other) not in (int, Marked):
            plain = int(self)
            return function(other, plain) if swapped else function(plain, other)  # type: ignore[arg-type]
        first, second = (other, self) if swapped else (self, other)
        made: Any = Marked._made(  # noqa: SLF001  # of this class
            function(int(first), int(second)),  # type: ignore[call-overload]
            lambda values: function(_value(first, values), _value(second, values)),
            _attributes(first) | _attributes(second),
        )
        return made

    return apply


def _value(number: object, values: Values) -> int:
    return number.formula(values) if isinstance(number, Marked) else int(number)  # type: ignore[call-overload]


def _attributes(number: object) -> frozenset[Attribute]:
    return number.attributes if isinstance(number, Marked) else frozenset()


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Marked, f"__{_name}__", _arithmetic(getattr(operator, _name), swapped=False))
    setattr(Marked, f"__r{_name}__", _arithmetic(getattr(operator, _name), swapped=True))


@dataclass
class Use:
    """A size that a torch function was given.

    Args:
        size: The number.
        axes: The axes that it may be the size of.
    """

    size: Marked
    axes: list[Axis]


class Uses(TorchFunctionMode):
    """Notes the sizes that torch functions are given while it is open.

    Args:
        axes_of: Gives the axes of a tensor.
    """

    def __init__(self, axes_of: Callable[[Tensor], Axes]) -> None:
        super().__init__()
        self.found: list[Use] = []
        self._axes_of = axes_of

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name not in _OF_ALL_AXES and name not in _OF_SOME_AXES:
            return output
        numbers = list(_numbers((args, kwargs or {})))
        if not any(isinstance(number, Marked) for number in numbers):
            return output
        results = [self._axes_of(x) for x in tree_leaves(output) if isinstance(x, Tensor)]
        read = [self._axes_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        in_order = name in _OF_ALL_AXES and len(results) == 1 and len(numbers) == len(results[0])
        for i, number in enumerate(numbers):
            if isinstance(number, Marked):
                axes = [results[0][i]] if in_order else _of_size(number, results) or _of_size(number, read)
                self.found.append(Use(number, axes))
        return output


def _of_size(size: int, several: Sequence[Axes]) -> list[Axis]:
    return [axis for axes in several for axis in axes if axis.size == size]


def _numbers(values: Any) -> Iterator[int]:
    """All whole numbers among arguments, those in tuples, lists and dicts too."""
    if isinstance(values, int) and not isinstance(values, bool):
        yield values
    elif isinstance(values, slice):
        yield from _numbers((values.start, values.stop))
    elif isinstance(values, tuple | list | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _numbers(value)


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Mark the whole numbers in the attributes of a model's modules."""
    before: list[tuple[nn.Module, str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, _KNOWN):
            continue
        for key, value in list(vars(module).items()):
            new = _marked(value, Attribute(name, key))
            if new is not None:
                before.append((module, key, value))
                module.__dict__[key] = new
    try:
        yield
    finally:
        for module, key, value in before:
            module.__dict__[key] = value


def _marked(value: Any, attribute: Attribute) -> Any:
    if type(value) is int and value > 1:
        return Marked.of(value, attribute)
    if type(value) in (tuple, list) and value and all(type(one) is int for one in value):
        return type(value)(Marked.of(one, attribute._replace(place=i)) for i, one in enumerate(value))
    return None


def follow_sizes(
    model: nn.Module, uses: Sequence[Use], size_after: Callable[[Axis], int]
) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """New values of attributes, so that the sizes are right that functions are given.

    Args:
        model: The model.
        uses: The sizes that its functions are given.
        size_after: How large an axis will be.

    Returns:
        The values that change, by the module's name and the attribute's.
    """
    modules = dict(model.named_modules())
    values = {attribute: _read(modules, attribute) for use in uses for attribute in use.size.attributes}
    before = dict(values)
    settled: set[Attribute] = set()
    demands = [(use, {size_after(axis) for axis in use.axes} or {int(use.size)}) for use in uses]
    for use, sizes in sorted(demands, key=lambda demand: len(demand[0].size.attributes)):
        changed = {size for size in sizes if size != int(use.size)}
        wanted = min(changed) if changed and len(sizes) == 1 else None
        if wanted is not None and len(use.size.attributes) == 1:
            (attribute,) = use.size.attributes
            if attribute not in settled:
                settled.add(attribute)
                values[attribute] = _solved(use.size.formula, values, attribute, wanted)
    for use, sizes in demands:
        if use.size.formula(values) in sizes or len(sizes) != 1:
            continue
        (wanted,) = sizes
        for attribute in sorted(use.size.attributes - settled):
            tried = _solved(use.size.formula, values, attribute, wanted)
            if use.size.formula({**values, attribute: tried}) == wanted:
                settled.add(attribute)
                values[attribute] = tried
                break
    return _by_module(modules, {key: value for key, value in values.items() if value != before[key]})


def _solved(formula: Formula, values: Values, attribute: Attribute, wanted: int) -> int:
    """The value of an attribute with which a formula, which is nearly always a product or a quotient, gives a size."""
    old = values[attribute]
    now = formula(values)
    for tried in (wanted, old * wanted // max(now, 1), old + wanted - now):
        if tried > 0 and formula({**values, attribute: tried}) == wanted:
            return tried
    return old


def _read(modules: Mapping[str, nn.Module], attribute: Attribute) -> int:
    value = vars(modules[attribute.module])[attribute.key]
    return int(value if attribute.place < 0 else value[attribute.place])


def _by_module(modules: Mapping[str, nn.Module], values: Values) -> dict[str, dict[str, int | tuple[int, ...]]]:
    found: dict[str, dict[str, int | tuple[int, ...]]] = {}
    for attribute, value in values.items():
        own = found.setdefault(attribute.module, {})
        if attribute.place < 0:
            own[attribute.key] = value
        else:
            whole = list(own.get(attribute.key, vars(modules[attribute.module])[attribute.key]))
            whole[attribute.place] = value
            own[attribute.key] = tuple(whole)
    return found
