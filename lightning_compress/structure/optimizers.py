"""What an optimizer knows of its parameters shrinks with them, where it has their shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["check_optimizer", "cut", "cut_state_of", "forget"]


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise unless an optimizer's state can shrink with the parameters: it must have their shape.

    Raises:
        ValueError: If it keeps state of other shapes.
    """
    wrong = "its history of whole gradients" if isinstance(optimizer, torch.optim.LBFGS) else ""
    if not wrong and optimizer.param_groups:
        wrong = ", ".join(_unfit_on_trial(optimizer))
        for p, state in optimizer.state.items():
            wrong = wrong or ", ".join(_unfit(state, p))
    if wrong:
        raise ValueError(
            f"{type(optimizer).__name__} keeps state that cannot shrink with its parameters ({wrong}). Accepted are "
            "optimizers whose state has the parameters' shape: SGD, Adam, AdamW, RMSprop, NAdam, Adagrad, Lion."
        )


def _unfit_on_trial(optimizer: torch.optim.Optimizer) -> list[str]:
    """What an optimizer of this class and with these options keeps in other shapes after one step."""
    p = next((p for group in optimizer.param_groups for p in group["params"]), torch.zeros(1))
    probe = nn.Parameter(torch.zeros(4, 6, dtype=p.dtype, device=p.device))
    probe.grad = torch.ones_like(probe)
    try:
        options = {**optimizer.defaults, "lr": float(optimizer.defaults.get("lr", 1e-3))}
        trial = type(optimizer)([probe], **options)
        trial.step()
        return _unfit(trial.state[probe], probe)
    except Exception:  # an optimizer that cannot be made of its defaults shows its state when it has some
        return []


def cut_state_of(optimizer: torch.optim.Optimizer, kept: Mapping[int, Mapping[int, Tensor]]) -> None:
    """Shrink an optimizer's state.

    Args:
        optimizer: The optimizer.
        kept: The indices that are kept, by the parameter's id and by axis.

    Raises:
        ValueError: If it keeps state of other shapes.
    """
    for p, state in optimizer.state.items():
        axes = kept.get(id(p))
        if axes is None:
            continue
        unfit = _unfit(state, p)
        if unfit:
            raise ValueError(
                f"{type(optimizer).__name__} keeps state that cannot shrink with its parameters ({', '.join(unfit)}). "
                "Take an optimizer whose state has the parameters' shape, such as SGD or AdamW."
            )
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim():
                state[key] = cut(value, axes)


def forget(optimizer: torch.optim.Optimizer, gone: Iterable[int]) -> None:
    """Take parameters out of an optimizer, with their state.

    Args:
        optimizer: The optimizer.
        gone: Ids of the parameters.
    """
    gone = set(gone)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in gone:
                optimizer.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) not in gone]


def cut(values: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """The values at the indices that are kept of each axis."""
    for axis, keep in axes.items():
        values = values.index_select(axis, keep.to(values.device))
    return values.contiguous()


def _unfit(state: Mapping[str, object], p: Tensor) -> list[str]:
    return [k for k, v in state.items() if isinstance(v, Tensor) and v.numel() > 1 and v.shape != p.shape]
