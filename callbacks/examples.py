"""With which arguments a model is called: found by watching a step of a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_compress.analysis.inspect import count_macs
from lightning_compress.forward import Inputs, fitting_batch, map_tensors, record_inputs, run_model
from lightning_compress.quantization.convert import to_float
from lightning_compress.structure.mirrors import find_mirrors
from lightning_compress.ways import Explored, Way, unseen

from .evaluate import copied, evaluate, run_training_step
from .rehearsal import Rehearsal, rehearse

__all__ = ["Calls", "example_calls", "example_inputs", "in_single_precision", "no_inputs"]


@dataclass
class Calls:
    """The calls that make up the forward of a model.

    Args:
        inputs: The arguments by the called module's name: empty for the model itself, which then makes the only call.
            They tell what the model costs.
        ways: Every way that a step takes through the model.
        unseen: Names of the modules with weights that no step ran.
        batches: How many batches a changed copy is tried with, by stage that the model goes through.
    """

    inputs: dict[str, Inputs]
    ways: list[Way] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    batches: dict[str, int] = field(default_factory=dict)

    def run(self, model: nn.Module) -> list[object]:
        """What the calls return on every way."""
        return [way.run(model) for way in self.ways]

    def macs(self, model: nn.Module) -> int:
        """Multiply-accumulates of one sample."""
        return sum(count_macs(model.get_submodule(name), inputs)[""] for name, inputs in self.inputs.items())

    def of_one_sample(self, model: nn.Module) -> Callable[[], object]:
        """Runs one sample."""
        modules = [model.get_submodule(name) for name in self.inputs]
        pairs = [(m, fitting_batch(m, inputs, 1)) for m, inputs in zip(modules, self.inputs.values(), strict=True)]
        return lambda: [run_model(module, one) for module, one in pairs]


def example_inputs(trainer: pl.Trainer, model: pl.LightningModule) -> Inputs | None:
    """The arguments with which validation calls the model, else its example_input_array, else those of training.

    Args:
        trainer: The Trainer of the run, for its data.
        model: The model; copies of it are run.
    """
    inputs = _known_inputs(trainer, model)
    if inputs is not None:
        return inputs
    try:
        return _training_inputs(trainer, model)
    except Exception:  # a step that cannot run alone
        return None


def example_calls(trainer: pl.Trainer, model: pl.LightningModule, who: str) -> Calls:
    """The model's own call or, where no step makes it, the calls of its modules in a training step; of two samples.

    Args:
        trainer: The Trainer of the run, for its data.
        model: The model; copies of it are run.
        who: Who asks, for the messages.

    Raises:
        ValueError: If no step calls a module, and there is no example_input_array.
    """
    rehearsal = rehearse(trainer, model)
    found = _main_calls(trainer, model, rehearsal)
    if not found:
        why = rehearsal.failed.get("training_step")
        tried = f" Tried on a copy of the model, training_step raised {why}." if why else ""
        raise ValueError(f"{who} needs an example of the model's inputs: {no_inputs(model)}{tried}")
    if "" not in found:
        rank_zero_info(
            f"{who} finds no step that calls {type(model).__name__} itself, and takes what training_step calls one by "
            f"one: {', '.join(found)}. What they return keeps its shape. To take them as one, {_fix(model)}"
        )
    plain = in_single_precision(model)
    fitting = {name: fitting_batch(plain.get_submodule(name), _single(inputs), 2) for name, inputs in found.items()}
    # averages follow what they are averages of, and are not looked at by themselves
    averages = tuple(f"{copy}." for copy, source in find_mirrors(model).items() if source is not None)
    calls = [call for calls in rehearsal.calls.values() for call in calls]
    made = [call for call in calls if not f"{call.name}.module.".startswith(averages)]
    main = [Way(name, inputs) for name, inputs in fitting.items()]
    explored = _explore(plain, main, made, rehearsal.seen)
    # where none can be gone in a copy, the call's own error says why
    return Calls(fitting, explored.ways or main, unseen(model, rehearsal.seen | explored.modules), rehearsal.batches)


def _main_calls(trainer: pl.Trainer, model: pl.LightningModule, rehearsal: Rehearsal) -> dict[str, Inputs]:
    """The arguments of the model's call in validation, of its example_input_array, or of the calls in training."""
    whole = _first_calls(rehearsal.calls.get("validate", [])).get("")
    whole = _array_inputs(trainer, model) if whole is None else whole
    in_training = _first_calls(rehearsal.calls.get("fit", []))
    whole = in_training.get("") if whole is None else whole
    return in_training if whole is None else {"": whole}


def _first_calls(calls: Sequence[Way]) -> dict[str, Inputs]:
    return {call.name: call.inputs for call in reversed(calls)}


def _explore(plain: nn.Module, main: Sequence[Way], made: Sequence[Way], seen: set[str]) -> Explored:
    """Every way that calls take through a copy of a model: those of its own calls, then whatever else ran."""
    explored = Explored()
    for call in main:
        explored.explore(plain, call)
    single = [replace(call, inputs=_single(call.inputs)) for call in made]
    for call in single:
        if call.name in {way.name for way in main}:
            inputs = fitting_batch(plain.get_submodule(call.name), call.inputs, 2)
            explored.explore(plain, replace(call, inputs=inputs))
    # what two samples do not reach, such as an expert, and modules that steps call themselves
    for call in sorted(single, key=lambda call: bool(call.name)):
        inside = {f"{call.name}.{name}".strip(".") for name, _ in plain.get_submodule(call.name).named_modules()}
        if inside & seen - explored.modules:
            explored.explore(plain, call)
    return explored


def no_inputs(model: pl.LightningModule) -> str:
    """Why there are no example inputs, and the line that gives them."""
    fix = _fix(model)
    return f"neither validation nor training calls {type(model).__name__}.forward. {fix[0].upper()}{fix[1:]}"


def in_single_precision(model: pl.LightningModule) -> pl.LightningModule:
    """A float copy in single precision: proofs compare values more closely than half precision has them."""
    return to_float(model).float()


def _fix(model: pl.LightningModule) -> str:
    if is_overridden("forward", model):
        return "set self.example_input_array = torch.randn(...) in __init__, with the shape of a batch."
    return "define forward, and call self(...) in training_step."


def _single(inputs: Inputs) -> Inputs:
    return Inputs(*map_tensors(lambda x: x.float() if x.is_floating_point() else x, tuple(inputs)))


def _known_inputs(trainer: pl.Trainer, model: pl.LightningModule) -> Inputs | None:
    """The arguments with which validation calls the model; its example_input_array where there is no such call."""
    watched = copied(model)
    try:
        recorded = record_inputs(watched, lambda: evaluate(trainer, watched))
    except Exception:  # a validation that cannot run alone
        recorded = None
    return _array_inputs(trainer, model) if recorded is None else recorded


def _array_inputs(trainer: pl.Trainer, model: pl.LightningModule) -> Inputs | None:
    """The example_input_array of a model, as arguments."""
    array = model.example_input_array
    if array is None or not is_overridden("forward", model):
        return None
    array = trainer.precision_plugin.convert_input(array)
    if isinstance(array, dict):
        return Inputs((), array)
    return Inputs(array if isinstance(array, tuple) else (array,), {})


def _training_inputs(trainer: pl.Trainer, model: pl.LightningModule) -> Inputs | None:
    """The arguments of the model's first call in training."""
    watched = copied(model)
    return record_inputs(watched, lambda: run_training_step(trainer, watched))
