"""What the checks have in common: values, comparisons, and errors that name what broke."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["attempt", "noise", "random_states", "refuses", "require", "same"]


def noise(shape: Sequence[int], seed: int, uniform: bool = False) -> Tensor:
    """Values of a generator of their own: normal, or uniform in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand if uniform else torch.randn)(tuple(shape), generator=generator)


def random_states() -> tuple[Tensor, Any]:
    """Of torch and of Python."""
    return torch.get_rng_state(), random.getstate()


def same(a: object, b: object) -> bool:
    """Whether two values, tensors among them, are equal."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def refuses(what: str, method: Callable[[Any], str | None], given: object) -> bool:
    """Whether a user's code refuses a layer or shape; None or a reason are the only answers."""
    with attempt(what):
        reason = method(given)
    require(reason is None or (isinstance(reason, str) and reason), f"{what} gives {reason!r}, no reason in words")
    return reason is not None


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into an AssertionError that names it."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error


def require(condition: object, message: str) -> None:
    """An AssertionError with this message, unless the condition holds."""
    if not condition:
        raise AssertionError(message)
