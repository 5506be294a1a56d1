"""What an optimizer knows of its parameters shrinks with them where it has their shape, and else begins anew."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.structure.held import change_state, forget_states, states_of, unfit, with_wrapped

__all__ = ["check_forgetting", "check_optimizer", "copy_optimizer", "cut", "cut_state_of", "elementwise", "forget"]


def check_optimizer(name: str, optimizer: Optimizer) -> list[str]:
    """Raise unless an optimizer steps on when its parameters shrink in the middle of a run.

    That is tried on a copy that has a few of the parameters. One that cannot be tried, because it does not step on a
    copy, is taken as it is.

    Args:
        name: Who shrinks them, for the message.
        optimizer: The optimizer.

    Returns:
        What it keeps in other shapes than those of the parameters: that begins anew where a parameter shrinks.

    Raises:
        ValueError: If it does not step on.
    """
    trial = _Trial.of(optimizer)
    if trial is None:
        return []
    wrong = sorted({key for _, p, state in states_of(trial.optimizer) for key in unfit(state, p)})
    first, *others = trial.params
    try:
        # apart: an optimizer may keep with one parameter what it knows of others
        for params in (others, [first]):
            trial.halve(params)
            trial.step()
        if others:
            forget(trial.optimizer, [id(first)])
            trial.step()
    except Exception as error:
        raise _refusal(name, optimizer, "shrink with its parameters", wrong) from error
    return wrong


def check_forgetting(name: str, optimizer: Optimizer) -> None:
    """Raise unless an optimizer steps on when its whole state is forgotten in the middle of a run.

    Args:
        name: What forgets it, for the message.
        optimizer: The optimizer.

    Raises:
        ValueError: If it does not.
    """
    trial = _Trial.of(optimizer)
    if trial is None:
        return
    wrong = sorted({key for _, _, state in states_of(trial.optimizer) for key in state})
    try:
        forget_states(trial.optimizer)
        trial.step()
    except Exception as error:
        raise _refusal(name, optimizer, "be forgotten", wrong) from error


def _refusal(name: str, optimizer: Optimizer, what: str, keys: list[str]) -> ValueError:
    where = ", ".join(keys) or "outside of its state"
    return ValueError(
        f"{name}: {type(optimizer).__name__} keeps state that cannot {what} ({where}). "
        "Accepted are optimizers whose state has the parameters' shape, or begins anew when it is taken away: SGD, "
        "Adam, AdamW, RMSprop, NAdam, Adagrad, Lion. Train with one of them."
    )


def elementwise(optimizer: Optimizer) -> list[Optimizer]:
    """Of an optimizer and those that it wraps, the ones that know of each weight by itself.

    All their state has the parameters' shape, or is plain: a weight's share of it can be cut or zeroed with the weight.
    """
    trial = _Trial.of(optimizer)
    held = with_wrapped(optimizer)
    tried = held if trial is None else with_wrapped(trial.optimizer)
    others = {id(each) for each, p, state in states_of(optimizer) if unfit(state, p)}
    if trial is not None:
        others |= {id(each) for each, p, state in states_of(trial.optimizer) if unfit(state, p)}
    return [each for each, twin in zip(held, tried, strict=True) if id(each) not in others and id(twin) not in others]


class _Trial:
    """A copy of an optimizer with copies of a few parameters, which has taken two steps."""

    def __init__(self, optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.params = params

    @classmethod
    def of(cls, optimizer: Optimizer) -> _Trial | None:
        """None for one that does not step on a copy."""
        if not any(group["params"] for group in optimizer.param_groups):
            return None
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if any(hasattr(p, "full_tensor") for p in params):  # of DTensors, whose class is slow to import
            return None  # its steps would be those of all processes
        # with all of them where a few are not enough, as for one that keeps a list with something for each
        for some in (_some(optimizer), params):
            chosen = {id(p): nn.Parameter(p.detach().clone()) for p in some}
            try:
                trial = cls(copy_optimizer(optimizer, dict(chosen), chosen), list(chosen.values()))
                if callable(getattr(trial.optimizer, "train", None)):
                    trial.optimizer.train()  # type: ignore[attr-defined]
                trial.step()
            except Exception:
                continue
            return trial
        return None

    def step(self) -> None:
        """Two steps, of gradients that do not matter; the random states stay as they are."""
        with torch.random.fork_rng(devices={p.device for p in self.params if p.device.type == "cuda"}):
            for _ in range(2):
                self._gradients()
                takes_closure = inspect.signature(self.optimizer.step).parameters
                self.optimizer.step(*([self._gradients] if takes_closure else []))

    def halve(self, params: list[nn.Parameter]) -> None:
        """Shrink some of the parameters to half of each axis."""
        kept = {id(p): {axis: torch.arange((n + 1) // 2) for axis, n in enumerate(p.shape)} for p in params}
        cut_state_of(self.optimizer, kept)
        for p in params:
            p.grad = None
            p.data = cut(p.data, kept[id(p)])

    @torch.enable_grad()
    def _gradients(self) -> Any:
        for p in self.params:
            p.grad = None
        # of no loss that could be at its minimum: some optimizers would not step there
        loss = torch.stack([(p * torch.randn_like(p)).sum().float() for p in self.params]).sum()
        loss.backward()
        return loss.detach()


def _some(optimizer: Optimizer) -> list[Tensor]:
    """Of each group, and of each number of axes, the two smallest parameters, those whose axes differ in front."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        by_axes: dict[int, list[Tensor]] = {}
        for p in group["params"]:
            if p.numel():
                by_axes.setdefault(p.dim(), []).append(p)
        for same in by_axes.values():
            found += sorted(same, key=lambda p: (len(set(p.shape)) < p.dim(), p.numel()))[:2]
    return list({id(p): p for p in found}.values())


def copy_optimizer(
    optimizer: Optimizer, memo: dict[int, Any], params: Mapping[int, nn.Parameter] | None = None
) -> Optimizer:
    """A copy whose steps change other parameters; with what it wraps, and without hooks.

    torch copies the state alone of what an optimizer has.

    Args:
        optimizer: The optimizer.
        memo: That of ``copy.deepcopy``: by id, what takes the place of each parameter.
        params: By id, what takes their place; all others are left out.
    """
    wrapped = with_wrapped(optimizer)
    copies = [object.__new__(type(each)) for each in wrapped]
    memo |= {id(each): other for each, other in zip(wrapped, copies, strict=True)}
    for each in wrapped:
        # groups are often shared with the optimizer that is wrapped
        _memorize(each, memo, params)
    for each, other in zip(wrapped, copies, strict=True):
        # a step that is patched belongs to the original, as hooks do
        own = {k: v for k, v in vars(each).items() if not (callable(v) and hasattr(type(each), k))}
        hooks = {k: type(v)() for k, v in own.items() if k.startswith("_optimizer_") and isinstance(v, dict)}
        other.__dict__.update(copy.deepcopy({k: v for k, v in own.items() if k not in hooks}, memo) | hooks)
    return copies[0]


def _memorize(optimizer: Optimizer, memo: dict[int, Any], params: Mapping[int, nn.Parameter] | None) -> None:
    """Note what takes the place of the state and the groups, with the given parameters alone."""
    if params is None:
        return
    if id(optimizer.state) not in memo:
        state = copy.copy(optimizer.state)
        state.clear()
        memo[id(optimizer.state)] = state
        for p, known in optimizer.state.items():
            if id(p) in params:
                state[params[id(p)]] = copy.deepcopy(known, memo)
            elif not isinstance(p, Tensor):
                state[p] = copy.deepcopy(known, memo)
    for group in optimizer.param_groups:
        if id(group["params"]) not in memo:
            memo[id(group["params"])] = [params[id(p)] for p in group["params"] if id(p) in params]


def cut_state_of(optimizer: Optimizer, kept: Mapping[int, Mapping[int, Tensor]]) -> None:
    """Shrink an optimizer's state: what has a parameter's shape is cut.

    In an optimizer that keeps other shapes, too, all that it knows of a parameter begins anew: what stands beside them
    may be in coordinates of its own, or have the parameter's shape by chance.

    Args:
        optimizer: The optimizer.
        kept: The indices that are kept, by the parameter's id and by axis.
    """
    fit = {id(each) for each in elementwise(optimizer)}
    for each, p, state in states_of(optimizer):
        axes = kept.get(id(p))
        if axes is None:
            continue
        if id(each) in fit:
            change_state(state, p, partial(cut, axes=axes))
        else:
            del each.state[p]


def forget(optimizer: Optimizer, gone: Iterable[int]) -> None:
    """Take parameters out of an optimizer, with their state.

    Args:
        optimizer: The optimizer.
        gone: Ids of the parameters.
    """
    gone = set(gone)
    for each, p, _ in states_of(optimizer):
        if id(p) in gone:
            del each.state[p]
    for each in with_wrapped(optimizer):
        for group in each.param_groups:
            # in place: others may hold on to the list
            group["params"][:] = [p for p in group["params"] if id(p) not in gone]


def cut(values: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """The values at the indices that are kept of each axis."""
    for axis, keep in axes.items():
        values = values.index_select(axis, keep.to(values.device))
    # a sparse gradient has no memory format
    return values if values.is_sparse else values.contiguous()
