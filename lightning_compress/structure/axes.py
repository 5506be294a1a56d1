"""The algebra of axes: what each axis of a tensor is made of, and which axes have to keep the same channels.

A view makes one axis of several and several of one; a concatenation puts axes side by side. An :class:`Axis` is
therefore a *leaf*, of channels that come and go one by one, a *product* of axes (major to minor, as of heads and the
channels of a head), or a *sum* of axes (one behind the other, as of queries, keys and values). Where two tensors are
added or multiplied their axes are one and the same: they are *united*, which splits leaves as far as needed. All of it
is unification of terms (Robinson 1965); nothing looks at numbers in tensors, and no loop grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Axis", "cut", "factors_of", "in_steps", "leaves_of", "pin", "place_of", "product_of", "side_by_side"]
__all__ += ["split_in_two", "unite"]


class Axis:
    """One axis, or a part of one.

    Args:
        size: How many positions it has.
        why: Why none of them can be removed; empty where nothing speaks against it.

    Attributes:
        step: What is left has to be a multiple of this, as kernels want it.
    """

    __slots__ = ("_is", "kind", "number", "parts", "size", "step", "why")
    _numbers = count()

    def __init__(self, size: int, why: str = "") -> None:
        self.size = size
        self.why = why
        self.step = 1
        self.kind: Literal["leaf", "product", "sum"] = "leaf"
        self.parts: tuple[Axis, ...] = ()
        self.number = next(Axis._numbers)
        self._is: Axis | None = None

    @property
    def now(self) -> Axis:
        """What it has turned out to be."""
        axis = self
        while axis._is is not None:
            axis = axis._is
        while self._is is not None:  # what comes next finds it at once
            self._is, self = axis, self._is
        return axis

    def becomes(self, other: Axis) -> None:
        """A leaf turns out to be another axis."""
        other = other.now
        if other is not self:
            pin(other, self.why)
            in_steps(other, self.step)
            self._is = other

    def consists_of(self, kind: Literal["product", "sum"], parts: Sequence[Axis]) -> None:
        """A leaf turns out to have parts, or a sum to be a product."""
        self.kind = kind
        self.parts = tuple(parts)
        for part in self.parts:
            pin(part, self.why)
            in_steps(part, self.step)


def product_of(parts: Sequence[Axis]) -> Axis:
    """One axis of several, the first one the major."""
    return _made("product", [factor for part in parts for factor in factors_of(part)])


def side_by_side(parts: Sequence[Axis]) -> Axis:
    """One axis of several, one behind the other."""
    return _made("sum", [part for part in parts if part.size])


def _made(kind: Literal["product", "sum"], parts: Sequence[Axis]) -> Axis:
    if len(parts) == 1:
        return parts[0]
    size = math.prod(part.size for part in parts) if kind == "product" else sum(part.size for part in parts)
    axis = Axis(size)
    if parts:
        axis.kind = kind
        axis.parts = tuple(parts)
    return axis


def leaves_of(axis: Axis) -> Iterator[Axis]:
    """The leaves that an axis is made of."""
    left = [axis]
    while left:
        now = left.pop().now
        if now.kind == "leaf":
            yield now
        else:
            left.extend(reversed(now.parts))


def pin(axis: Axis, why: str) -> None:
    """Keep all of an axis; the first reason that is given stays."""
    if why:
        for leaf in leaves_of(axis):
            leaf.why = leaf.why or why


def in_steps(axis: Axis, step: int) -> None:
    """Let what is left of an axis be a multiple of a number."""
    if step > 1:
        for leaf in leaves_of(axis):
            leaf.step = math.lcm(leaf.step, step)


def unite(a: Axis, b: Axis) -> None:
    """Let two axes of one size be the same.

    Where one cannot be divided as the other is, both are pinned.
    """
    left = [(a, b)]
    while left:
        a, b = (axis.now for axis in left.pop())
        if a is b or a.size == b.size == 1:
            continue
        if a.size != b.size:
            _clash(a, b)
        elif a.kind == "leaf" and (b.kind != "leaf" or a.number > b.number):  # the older leaf stays
            a.becomes(b)
        elif b.kind == "leaf":
            b.becomes(a)
        elif "product" in (a.kind, b.kind):
            left.extend(_aligned(a, b, factors_of, split_in_two))
        else:
            left.extend(_aligned(a, b, _terms, cut))


def _clash(a: Axis, b: Axis) -> None:
    for axis in (a, b):
        pin(axis, "its channels are rearranged")


def factors_of(axis: Axis) -> list[Axis]:
    """Its factors, none of which is a product or of size 1."""
    axis = axis.now
    if axis.size == 1:
        return []
    if axis.kind != "product":
        return [axis]
    return [factor for part in axis.parts for factor in factors_of(part)]


def _terms(axis: Axis) -> list[Axis]:
    """Its terms, none of which is a sum."""
    axis = axis.now
    if axis.kind != "sum":
        return [axis]
    return [term for part in axis.parts for term in _terms(part)]


def _aligned(
    a: Axis, b: Axis, parts: Callable[[Axis], list[Axis]], divide: Callable[[Axis, int], tuple[Axis, Axis] | None]
) -> list[tuple[Axis, Axis]]:
    """Pairs of parts of one size, divided where one axis has more of them."""
    ours = parts(a)[::-1]
    theirs = parts(b)[::-1]
    pairs = []
    while ours and theirs:
        x = ours.pop()
        y = theirs.pop()
        if x.size == y.size:
            pairs.append((x, y))
            continue
        larger, smaller, rest = (x, y, ours) if x.size > y.size else (y, x, theirs)
        two = divide(larger, smaller.size)
        if two is None:
            _clash(a, b)
            return []
        pairs.append((two[0], smaller))
        rest.extend(reversed(parts(two[1])))
    return pairs


def split_in_two(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    """An axis as a product of two, the major one of a given size; None where it cannot be.

    Example:
        >>> hidden = Axis(64)
        >>> heads, channels = split_in_two(hidden, 4)
        >>> heads.size, channels.size, hidden.kind
        (4, 16, 'product')
    """
    axis = axis.now
    if size == 1:
        return Axis(1), axis
    if size == axis.size:
        return axis, Axis(1)
    if axis.size % size:
        return None
    minor_size = axis.size // size
    if axis.kind == "leaf":
        halves = Axis(size), Axis(minor_size)
        axis.consists_of("product", halves)
        return halves
    if axis.kind == "product":
        return _split_product(axis, size)
    return _split_sum(axis, minor_size)


def _split_product(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    factors = factors_of(axis)
    majors: list[Axis] = []
    while size > 1:
        factor = factors.pop(0)
        if size % factor.size == 0:
            majors.append(factor)
            size //= factor.size
            continue
        halves = split_in_two(factor, size)
        if halves is None:
            return None
        majors.append(halves[0])
        factors.insert(0, halves[1])
        break
    return product_of(majors), product_of(factors)


def _split_sum(axis: Axis, minor_size: int) -> tuple[Axis, Axis] | None:
    """Each term is divided alike, or pieces of the minor axis' size follow each other."""
    terms = _terms(axis)
    if all(term.size % minor_size == 0 for term in terms):
        halves = [split_in_two(term, term.size // minor_size) for term in terms]
        if None in halves:
            return None
        major = side_by_side([half[0] for half in halves if half])
        minors = [half[1] for half in halves if half]
    else:
        pieces = _pieces(axis, minor_size)
        if pieces is None:
            return None
        major = side_by_side([Axis(1) for _ in pieces])
        minors = pieces
    for minor in minors[1:]:
        unite(minors[0], minor)
    axis.consists_of("product", (major, minors[0]))
    return major, minors[0]


def _pieces(axis: Axis, size: int) -> list[Axis] | None:
    pieces = []
    while axis.size > size:
        two = cut(axis, size)
        if two is None:
            return None
        pieces.append(two[0])
        axis = two[1]
    return [*pieces, axis]


def cut(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    """The first positions of an axis, and the others; None where it cannot be cut there.

    Example:
        >>> gated = Axis(8)
        >>> [piece.size for piece in cut(gated, 3)], gated.kind
        ([3, 5], 'sum')
    """
    axis = axis.now
    if axis.kind == "leaf":
        pieces = Axis(size), Axis(axis.size - size)
        axis.consists_of("sum", pieces)
        return pieces
    if axis.kind == "product":
        first, *others = factors_of(axis)
        rest = product_of(others)
        two = cut(first, size // rest.size) if size % rest.size == 0 else None
        return None if two is None else (product_of([two[0], rest]), product_of([two[1], rest]))
    terms = _terms(axis)
    before: list[Axis] = []
    while size >= terms[0].size:
        before.append(terms.pop(0))
        size -= before[-1].size
        if not terms:
            break
    if size:
        two = cut(terms[0], size)
        if two is None:
            return None
        before.append(two[0])
        terms[0] = two[1]
    return side_by_side(before), side_by_side(terms)


def place_of(axis: Axis, leaf: Axis) -> list[Tensor]:
    """Where the channels of a leaf lie along an axis: a channel per position, -1 where there is none of the leaf.

    Returns:
        One tensor of shape (axis,) per time that the leaf is a factor of the axis; none where it is not.

    Example:
        >>> heads, size = Axis(2), Axis(3)
        >>> place_of(product_of([heads, size]), heads)
        [tensor([0, 0, 0, 1, 1, 1])]
        >>> place_of(side_by_side([size, heads]), heads)
        [tensor([-1, -1, -1,  0,  1])]
    """
    axis = axis.now
    if axis is leaf:
        return [torch.arange(axis.size)]
    found: list[Tensor] = []
    inner = 1
    start = 0
    if axis.kind == "product":
        for part in reversed(axis.parts):
            outer = axis.size // (inner * part.size)
            for own in place_of(part, leaf):
                found.append(own.repeat_interleave(inner).repeat(outer))
            inner *= part.size
    elif axis.kind == "sum":
        for part in axis.parts:
            for i, own in enumerate(place_of(part, leaf)):
                if i == len(found):
                    found.append(torch.full((axis.size,), -1))
                found[i][start : start + part.size] = own
            start += part.size
    return found
