"""The ways through a model: calls that run different code, each gone again as it was.

A call takes one of several ways where the code looks at data (``if x.mean() > 0``), at chance (stochastic depth) or at
its mode (``if self.training``). :class:`Explored` finds them: it turns each look at data the other way, and draws anew.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_compress.forward import Inputs, map_tensors
from lightning_compress.functions import DROPOUTS
from lightning_compress.layers import modules_by_name
from lightning_compress.trace import Trace, ran
from lightning_compress.watch import Watch

__all__ = ["Explored", "Way", "modes_of", "unseen"]

_MOST = 16  # ways of one module
_SEEDS = 24
_TRIES = 64
# Torch functions that give Python a truth about values.
_LOOKS = {"bool", "item", "equal", "allclose", "is_nonzero"}


@dataclass(frozen=True)
class Way:
    """One call of a module, and the way that it takes.

    Args:
        name: The module's name; empty for the model itself.
        inputs: Its arguments.
        training: Names of the modules that are in training mode. Layers of torch are not: nothing is dropped out, and
            one sample is enough for a batch norm.
        seed: Of all that is drawn by lot.
        turns: What each look at data says, in the order of the looks; what they see themselves behind the last.

    Example:
        >>> Way("", Inputs((torch.ones(2),), {})).run(nn.ReLU())
        tensor([1., 1.])
    """

    name: str
    inputs: Inputs
    training: frozenset[str] = frozenset()
    seed: int = 0
    turns: tuple[bool, ...] = ()

    def run(self, model: nn.Module) -> Any:
        """Go it in a copy of the model; gives what the module returns."""
        return self.turning(model, _Turns(self.turns))

    def turning(self, model: nn.Module, turns: _Turns) -> Any:
        """The same, noting the turns and whether anything is drawn by lot."""
        # a forward may take items out of its arguments, or write into them
        args, kwargs = map_tensors(lambda x: x.clone(), tuple(self.inputs))
        with _seeded(self.seed), _in_training(model, self.training), turns:
            before = _random_states()
            output = model.get_submodule(self.name)(*args, **kwargs)
            turns.drawn = _random_states() != before
            return output


def modes_of(model: nn.Module) -> frozenset[str]:
    """Names of the modules in training mode whose mode may decide what runs: those that hold others."""
    return frozenset(n for n, m in model.named_modules() if m.training and _decides(m))


@dataclass
class Explored:
    """What ran on the ways that are known.

    Args:
        ways: The ways.
        steps: What followed what on them, by the module that was called.
        modules: Names of the modules that ran.
    """

    ways: list[Way] = field(default_factory=list)
    steps: dict[str, set[object]] = field(default_factory=lambda: defaultdict(set))
    modules: set[str] = field(default_factory=set)

    def explore(self, model: nn.Module, call: Way) -> None:
        """Add the ways that a call can take and that run something new; none where the call raises.

        Args:
            model: A copy of the model, in eval mode.
            call: The call.
        """
        known = self.steps[call.name]
        left = [call]
        turned: set[object] = set()
        num = 0
        for _ in range(_TRIES):
            if not left or num == _MOST:
                return
            way = left.pop(0)
            turns = _Turns(way.turns)
            try:
                trace = _traced(model, way, turns)
            except Exception:  # one that the code raises on purpose, say, for values that it refuses
                continue
            if way is call and turns.drawn:
                left += [replace(call, seed=seed) for seed in range(1, _SEEDS)]
            names = _names(trace, call.name)
            steps = {*pairwise(names), *names}
            if steps <= known:
                continue
            known |= steps
            num += 1
            taken = tuple(value for _, value in turns.taken)
            self.ways.append(replace(way, turns=taken))
            self.modules |= ran(trace)
            for i, (place, value) in enumerate(turns.places()):
                if (place, not value) not in turned:
                    left.append(replace(way, turns=(*taken[:i], not value)))
                turned |= {(place, value), (place, not value)}


def unseen(model: nn.Module, names: set[str]) -> list[str]:
    """Names of the modules with weights of their own that are not among those that ran."""
    own = {name for name, m in modules_by_name(model).items() if next(m.parameters(recurse=False), None) is not None}
    return [name for name in modules_by_name(model) if name in own - names]


def _traced(model: nn.Module, way: Way, turns: _Turns) -> Trace:
    """What happens when a way is gone."""
    with torch.no_grad(), Watch(model) as watch:
        way.turning(model, turns)
    return watch.trace


def _names(trace: Trace, name: str) -> list[tuple[str, str]]:
    """What happened in the call of a module, in order."""
    names = [(type(event).__name__, event.name) for event in trace.events]
    return names[names.index(("Began", name)) :]


def _decides(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is not None


class _Turns(TorchFunctionMode):
    """Answers the looks at data as it is told, notes what was answered, and leaves dropouts out."""

    def places(self) -> Iterator[tuple[object, bool]]:
        """Where in the code it looked and for which time, and what was answered."""
        times: Counter[object] = Counter()
        for place, value in self.taken:
            times[place] += 1
            yield (place, times[place]), value

    def __init__(self, told: Sequence[bool]) -> None:
        super().__init__()
        self._told = list(told)
        self.taken: list[tuple[object, bool]] = []
        self.drawn = False

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in DROPOUTS and args:
            return args[0]
        output = func(*args, **(kwargs or {}))
        if name in _LOOKS and isinstance(output, bool):
            if len(self.taken) < len(self._told):
                output = self._told[len(self.taken)]
            frame = sys._getframe(1)  # noqa: SLF001  # where the code looks
            self.taken.append(((frame.f_code.co_filename, frame.f_lineno), output))
        return output


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """With a seed for all that draws by lot, and the random states as they were at the end."""
    states = (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _random_states() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))


@contextmanager
def _in_training(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    modules = [m for n, m in model.named_modules() if n in names and not m.training]
    for module in modules:
        module.training = True  # .train() would reach all below
    try:
        yield
    finally:
        for module in modules:
            module.training = False
