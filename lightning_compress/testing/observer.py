"""Whether an observer keeps its contract."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.observers import Observer
from lightning_compress.quantization.quantizer import Quantizer, extent
from lightning_compress.testing.attempt import attempt, noise, require

__all__ = ["check_observer"]


def check_observer(observer: Observer) -> None:
    """Check that an observer keeps the contract of :class:`lightning_compress.quantization.Observer`.

    A state is a float tensor of one axis and one size that ``update`` gives anew, the same when asked twice, and leaves
    as it is for no values. The range for a quantizer is (+inf, -inf) before anything was seen; then it lies within what
    was seen, low not above high. A state merged with one that has seen nothing gives the range that it gave, and
    merged ranks give the same range in any order.

    Args:
        observer: The observer to check.

    Raises:
        AssertionError: If the observer breaks the contract; the message says what is broken.

    Example:
        >>> from lightning_compress.quantization import MinMax
        >>> check_observer(MinMax())
    """
    name = type(observer).__name__
    require(isinstance(observer, Observer), f"{name} is no subclass of lightning_compress.quantization.Observer")
    normal = noise((8, 64), seed=8)
    batches = [normal[0] * 1e-3, normal[1], normal[2:6].relu(), normal[6] ** 5 - 3, torch.zeros(4), normal[7] + 2]
    kinds = {"mixed": batches, "rectified": [b.relu() for b in batches], "zero": [torch.zeros(3)]}
    with attempt(f"{name}.start"):
        start = observer.start()
    require(isinstance(start, Tensor) and start.dim() == 1, f"{name}.start gives no tensor of one axis")
    for (kind, batches), quantizer in itertools.product(kinds.items(), (Affine(4), Affine(8, symmetric=True))):
        where = f"for {kind} values and {quantizer}"

        def chosen(state: Tensor, quantizer: Quantizer = quantizer, where: str = where) -> list[float]:
            before = state.clone()
            with attempt(f"{name}.range {where}"):
                found = observer.range(state, quantizer)
            require(found.shape == (2,), f"{name}.range gives the shape {tuple(found.shape)}, not (2,), {where}")
            require(torch.equal(state, before), f"{name}.range changed the state {where}")
            return found.tolist()

        require(chosen(start)[0] > chosen(start)[1], f"{name}.range gives a range though nothing was seen {where}")
        states = [start]
        state = start
        for values in batches:
            kept = values.clone()
            before = state.clone()
            with attempt(f"{name}.update {where}"):
                new = observer.update(state, values)
                again = observer.update(state, values)
                same = observer.update(state, values[:0])
            require(torch.equal(values, kept), f"{name}.update changed the values {where}")
            require(torch.equal(state, before), f"{name}.update changed the state before {where}")
            require(torch.equal(new, again), f"{name}.update is not the same when asked twice {where}")
            require(torch.equal(same, state), f"{name}.update changed the state for no values {where}")
            fits = new.shape == start.shape and new.dtype == start.dtype
            require(fits, f"{name}.update gives a state of another shape or type {where}")
            state = new
            states.append(state)
        low, high = chosen(state)
        least, most = (float(end) for end in extent(torch.cat([b.flatten() for b in batches]), None))
        require(
            least <= low <= high <= most, f"{name}.range is {low:g}..{high:g}, seen was {least:g}..{most:g} {where}"
        )
        with attempt(f"{name}.merge {where}"):
            alone = observer.merge(torch.stack([start, state]))
            merged = observer.merge(torch.stack(states))
            turned = observer.merge(torch.stack(states[::-1]))
        require(chosen(alone) == [low, high], f"{name}.merge with nothing seen changes the range {where}")
        require(chosen(merged) == chosen(turned), f"{name}.merge depends on the order of the ranks {where}")
