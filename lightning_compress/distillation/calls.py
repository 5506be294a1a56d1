"""The calls of a student's module, recorded in a training step, and a teacher's answers to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.forward import Inputs

__all__ = ["Call", "check_names", "choose_module", "main_tensor", "record_calls", "teach", "visible_modules"]


@dataclass
class Call:
    """One call of a module.

    Args:
        name: The module's name.
        inputs: Its arguments, copied before the module could change them in place.
        outputs: What it returned.
        features: The outputs of other modules that it called, by name, in the order of the calls.
    """

    name: str
    inputs: Inputs
    outputs: object = None
    features: dict[str, list[Tensor | None]] = field(default_factory=dict)


def visible_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules whose calls can be observed, by name.

    A compiled module is among them; the modules inside it are not, because compiled code does not run their hooks.
    """
    return {n: m for n, m in model.named_modules() if "_orig_mod" not in n.split(".")}


def check_names(field: str, names: Sequence[str], known: Mapping[str, nn.Module]) -> None:
    """Refuse names of modules whose calls cannot be observed.

    Args:
        field: The argument that gives the names, as a user writes it.
        names: What it gives.
        known: The modules whose calls can be observed, by name.

    Raises:
        ValueError: If a name is not among the known ones.
    """
    for name in names:
        if name not in known:
            raise ValueError(
                f"{field}={name!r} names no module, or one inside a compiled one, where calls cannot be observed. "
                f"The modules are: {', '.join(n for n in known if n)}."
            )


def main_tensor(outputs: object) -> Tensor | None:
    """The tensor that is distilled: the one under ``logits`` if there is one, else the first floating-point tensor."""
    if isinstance(outputs, Mapping):
        outputs = dict(outputs)
        logits = outputs.get("logits")
    else:
        logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return next((x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()), None)


def choose_module(model: nn.Module, calls: Sequence[Call]) -> str:
    """The module to distil when none is named: the model itself if it was called, else the only module that was.

    Args:
        model: The student.
        calls: The calls of a training step.

    Returns:
        The module's name; empty for the model itself.

    Raises:
        ValueError: If several modules with parameters were called, or none.
    """
    modules = visible_modules(model)
    # A dict without values: a set that remembers the order, in which the error names them.
    names: dict[str, None] = {}
    for call in calls:
        student = main_tensor(call.outputs)
        has_parameters = next(modules[call.name].parameters(), None) is not None
        if has_parameters and student is not None and student.requires_grad:
            names[call.name] = None
    if "" in names:
        return ""
    if len(names) != 1:
        raise ValueError(
            f"KnowledgeDistillation.outputs='': training_step of {type(model).__name__} does not call the "
            f"LightningModule itself, but {' and '.join(names) or 'no module with parameters'}. Name the module that "
            "makes the logits: KnowledgeDistillation(outputs=...)."
        )
    return next(iter(names))


@contextmanager
def record_calls(modules: Mapping[str, nn.Module], features: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """Record the outermost calls of some modules; a call inside another one is part of the outer call.

    Args:
        modules: The modules by name.
        features: Modules whose outputs inside these calls are recorded too, by name.
    """
    calls: list[Call] = []
    depth = 0

    def begin(name: str, module: nn.Module, args: object, kwargs: object) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            calls.append(Call(name, Inputs(*tree_map(_unchanged, (args, kwargs)))))

    def see(name: str, module: nn.Module, args: object, outputs: object) -> None:
        if depth:
            calls[-1].features.setdefault(name, []).append(main_tensor(outputs))

    def end(module: nn.Module, args: object, outputs: object) -> None:
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


def _unchanged(x: object) -> Any:
    """A copy of a tensor; anything else as it is."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    return x


@torch.no_grad()
def teach(teacher: nn.Module, features: Mapping[str, nn.Module], call: Call) -> Call:
    """The teacher's answer to a call, without gradients; the global random state stays as it is.

    Args:
        teacher: The module that answers.
        features: Its modules whose outputs are recorded too, by the names that the student has for them.
        call: The student's call.
    """
    devices = {x.device for x in tree_leaves(tuple(call.inputs)) if isinstance(x, Tensor) and x.device.type == "cuda"}
    with torch.random.fork_rng(devices), record_calls({call.name: teacher}, features) as calls:
        teacher(*call.inputs.args, **call.inputs.kwargs)
    return calls[0]
