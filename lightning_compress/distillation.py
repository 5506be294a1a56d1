"""What a teacher says about the calls of a student's module, and how far the student is from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.forward import Inputs

__all__ = ["Call", "feature_loss", "main_tensor", "output_loss", "record_calls", "teach", "visible_modules"]

Loss = Literal["kl", "mse"]


@dataclass
class Call:
    """One call of a module.

    Args:
        name: The module's name.
        inputs: Its arguments as they were before the module could change them.
        outputs: What it returned.
        features: The outputs of other modules that it called, by name, in order.
    """

    name: str
    inputs: Inputs
    outputs: Any = None
    features: dict[str, list[Tensor | None]] = field(default_factory=dict)


def visible_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules whose calls can be seen, by name: compiled ones are, what is inside them is not."""
    return {n: m for n, m in model.named_modules() if "_orig_mod" not in n.split(".")}


def main_tensor(outputs: Any) -> Tensor | None:
    """The tensor that is taught: the one under ``logits`` where there is one, else the first floating one."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    leaves = tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    return next((x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()), None)


@contextmanager
def record_calls(modules: Mapping[str, nn.Module], features: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """The outermost calls of some modules; a call inside another's belongs to that one.

    Args:
        modules: The modules by name.
        features: Modules whose outputs inside these calls are kept.
    """
    calls: list[Call] = []
    depth = 0

    def begin(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            calls.append(Call(name, Inputs(*tree_map(_unchanged, (args, kwargs)))))

    def see(name: str, module: nn.Module, args: Any, outputs: Any) -> None:
        if depth:
            calls[-1].features.setdefault(name, []).append(main_tensor(outputs))

    def end(module: nn.Module, args: Any, outputs: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            calls[-1].outputs = outputs

    handles = [m.register_forward_hook(partial(see, name)) for name, m in features.items()]
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(partial(begin, name), prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(end, always_call=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _unchanged(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


@torch.no_grad()
def teach(teacher: nn.Module, features: Mapping[str, nn.Module], call: Call) -> Call:
    """The teacher's answer to a call, without gradients; random numbers that it draws are given back."""
    devices = {x.device for x in tree_leaves(tuple(call.inputs)) if isinstance(x, Tensor) and x.device.type == "cuda"}
    with torch.random.fork_rng(devices), record_calls({call.name: teacher}, features) as calls:
        teacher(*call.inputs.args, **call.inputs.kwargs)
    return calls[0]


def output_loss(student: Tensor, teacher: Tensor, kind: Loss, temperature: float, class_axis: int) -> Tensor:
    """How far a student's outputs are from a teacher's.

    Args:
        student: Logits of a classification; any numbers with ``"mse"``.
        teacher: The teacher's, of the same shape.
        kind: ``"kl"``: T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over all axes but the classes'
            (Hinton 2015, arXiv:1503.02531); ``"mse"``: the mean squared difference.
        temperature: T, which softens both.
        class_axis: Axis of the classes.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if kind == "mse":
        return F.mse_loss(student, teacher)
    student, teacher = (F.log_softmax(x / temperature, class_axis) for x in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(class_axis).mean()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two layers' outputs (hints, Romero 2015, arXiv:1412.6550)."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return F.mse_loss(student.to(dtype), teacher.to(dtype))
