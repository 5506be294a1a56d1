"""The user's own steps of training, validation, test and predict, run on copies of the model before it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_compress.checks import first_line
from lightning_compress.distillation import visible_modules
from lightning_compress.forward import Inputs, detached, replaced_forward
from lightning_compress.trace import Began, Ended, Ran, Trace, ran
from lightning_compress.watch import Watch
from lightning_compress.ways import Way, modes_of, unseen

from .evaluate import copied, has_validation, training_data, validation_data
from .runner import lend_optimizers, open_runner

__all__ = ["Rehearsal", "rehearse", "why_it_fails"]

_MOST = 4  # batches of a stage
_CALLS = 8  # of one module in a stage
_STEPS = {"validate": "validation_step", "fit": "training_step", "test": "test_step", "predict": "predict_step"}
_LIMITS = {"validate": "val", "fit": "train"}  # the Trainer's other names of stages


class _Done(Exception):
    """The steps are over, and nothing behind them is to run."""


@dataclass
class Rehearsal:
    """What the steps of a model do, found by running them on copies.

    No test data are loaded while a model trains, for that may cost a download: ``test_step`` and ``predict_step`` are
    given batches of validation, or of training, and are not known where they cannot take these.

    Args:
        calls: The outermost calls of the model and of its modules, by stage.
        traces: What happened in each step.
        batches: How many batches show all that a stage does, by each that runs on a copy and does more than to call the
            model.
        failed: Why a step does not run on a copy, by its name.
    """

    calls: dict[str, list[Way]] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)
    batches: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def seen(self) -> set[str]:
        """Names of the modules that ran."""
        return set().union(*(ran(trace) for trace in self.traces))


def why_it_fails(trainer: pl.Trainer, model: nn.Module, batches: Mapping[str, int]) -> str | None:
    """Why a changed copy does not go through the steps that the model itself goes through; None if it does.

    Args:
        trainer: The Trainer of the run, for its data.
        model: The copy, which is left as it is.
        batches: How many batches to take, by stage.
    """
    modes = {name: module.training for name, module in trainer.lightning_module.named_modules()}
    for stage, num in batches.items():
        tried = copied(model)  # type: ignore[arg-type]  # a copy of a LightningModule
        for name, module in tried.named_modules():
            module.training = modes.get(name, module.training)
        try:
            _run(trainer, tried, stage, num)
        except Exception as error:  # whatever a step or a hook raises
            return f"{_STEPS[stage]} fails without some of its channels: {first_line(error)}"
    return None


def rehearse(trainer: pl.Trainer, model: pl.LightningModule) -> Rehearsal:
    """Run each step of a model on a copy: one batch of every dataloader, more where parts of it have not run by then.

    Args:
        trainer: The Trainer of the run, for its data.
        model: The model, which is left as it is.
    """
    found = Rehearsal()
    for stage in _stages(trainer, model):
        before = len(unseen(model, found.seen))
        for num in (1, _MOST):
            watched = copied(model)
            calls: list[Way] = []
            traces: list[Trace] = []
            try:
                with _recorded(watched, calls):
                    _run(trainer, watched, stage, num, traces)
            except Exception as error:  # a step that cannot run alone
                found.failed[_STEPS[stage]] = first_line(error)
            found.traces += traces
            if _STEPS[stage] not in found.failed:
                # a second try that shows nothing more is not worth its batches
                shows_more = num == 1 or len(unseen(model, found.seen)) < before
                # the calls of the model itself are tried without its steps; in training hooks may change weights
                if shows_more and (stage == "fit" or any(call.name for call in calls) or _reads(traces)):
                    found.batches[stage] = num
            found.calls[stage] = calls
            before = len(unseen(model, found.seen))
            if not before:
                break
    return found


def _reads(traces: Sequence[Trace]) -> bool:
    """Whether a step itself reads a weight, outside of the calls of modules."""
    for trace in traces:
        own = set(trace.tensors.values())
        depth = 0
        for event in trace.events:
            depth += isinstance(event, Began)
            depth -= isinstance(event, Ended)
            if not depth and isinstance(event, Ran) and any(value.number in own for value in event.reads):
                return True
    return False


def _stages(trainer: pl.Trainer, model: pl.LightningModule) -> list[str]:
    kind = type(model)
    stages = ["validate"] if has_validation(trainer, model) else []
    stages.append("fit")
    if is_overridden("test_step", model) and kind.test_step is not kind.validation_step:
        stages.append("test")
    if is_overridden("predict_step", model):
        stages.append("predict")
    return stages


def _run(
    trainer: pl.Trainer, model: pl.LightningModule, stage: str, num: int, traces: list[Trace] | None = None
) -> None:
    """Run some batches of each dataloader through a stage of a copy, which is spoiled.

    Training goes on behind its last batch, for that is where averages of weights are taken; validation to the end of
    its epoch. What the others do at their ends, such as to write a file, is left out.
    """
    if traces is not None:
        _watch_step(model, _STEPS[stage], traces)
    if stage != "validate":
        model.__dict__[f"on_{'train' if stage == 'fit' else stage}_epoch_end"] = _stop
    source = validation_data(trainer) if stage != "fit" and has_validation(trainer, model) else training_data(trainer)
    limits = {"max_epochs": 1, "limit_val_batches": 0, f"limit_{_LIMITS.get(stage, stage)}_batches": num}
    options = {"fit": {}, "predict": {"return_predictions": False}}
    with open_runner(trainer, model, source, **limits) as (runner, data), suppress(_Done):
        if stage != "fit":
            lend_optimizers(runner, trainer, model)
        getattr(runner, stage)(model, **_data_of(stage, data), **options.get(stage, {"verbose": False}))


def _data_of(stage: str, data: dict[str, Any]) -> dict[str, Any]:
    """Data of validation or training as those of another stage."""
    if "datamodule" in data:
        module = data["datamodule"]
        given = {"val_dataloader", "train_dataloader"} & module.__dict__.keys()
        module.__dict__[f"{_LIMITS.get(stage, stage)}_dataloader"] = module.__dict__[given.pop()]
        return data
    (loaders,) = data.values()
    return {"train_dataloaders" if stage == "fit" else "dataloaders": loaders}


def _stop(*_: object) -> None:
    raise _Done


def _watch_step(model: pl.LightningModule, name: str, traces: list[Trace]) -> None:
    step = getattr(model, name)

    @wraps(step)
    def watched(*args: object, **kwargs: object) -> Any:
        with Watch(model) as watch:
            traces.append(watch.trace)
            return step(*args, **kwargs)

    model.__dict__[name] = watched


@contextmanager
def _recorded(model: pl.LightningModule, calls: list[Way]) -> Iterator[None]:
    """Note the outermost calls of a model and of its modules, with copies of their arguments."""
    depth = 0
    forward = model.forward

    def begin(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal depth
        depth += 1
        if depth == 1 and sum(call.name == name for call in calls) < _CALLS:
            calls.append(Way(name, detached(Inputs(args, kwargs)), modes_of(model)))

    def end(*_: object) -> None:
        nonlocal depth
        depth -= 1

    def whole(*args: Any, **kwargs: Any) -> Any:
        begin("", args, kwargs)
        try:
            return forward(*args, **kwargs)
        finally:
            end()

    with ExitStack() as stack:
        for name, module in visible_modules(model).items():
            if name and next(module.parameters(), None) is not None:
                before = module.register_forward_pre_hook(partial(_begin_of, begin, name), with_kwargs=True)
                stack.callback(before.remove)
                after = module.register_forward_hook(end, always_call=True)
                stack.callback(after.remove)
        stack.enter_context(replaced_forward(model, whole))
        yield


def _begin_of(begin: Any, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    begin(name, args, kwargs)
