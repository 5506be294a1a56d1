"""A copy of the model stands in for it in the user's own Trainer, where nothing of what it does lasts."""

from __future__ import annotations

import copy
import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_compress.copies import copy_module
from lightning_compress.structure.optimizers import copy_optimizer

from .silence import Silent, nothing, silent_wandb

__all__ = ["alone", "attached", "copied", "quiet", "rewound", "same_random", "standing_in", "twins"]


def copied(model: pl.LightningModule) -> pl.LightningModule:
    """A copy that can be evaluated while the Trainer holds on to the original.

    Loggers that the model holds, and what they write to, are silent in it.
    """
    trainer = model._trainer  # noqa: SLF001  # the property raises where there is none
    instead: dict[int, Any] = {id(trainer): trainer}
    for logger in [] if trainer is None else trainer.loggers:
        instead[id(logger)] = Silent(logger)
        # no new one is made: the Trainer asks each logger for it before it sets the model up
        experiment = getattr(logger, "experiment", None)
        if experiment is not None:
            instead[id(experiment)] = Silent(experiment)
    copy_ = copy_module(model, instead)
    copy_._metric_attributes = None  # noqa: SLF001  # a cache of the original's metrics by identity
    return copy_


@contextmanager
def standing_in(trainer: pl.Trainer, model: pl.LightningModule, *watching: pl.Callback) -> Iterator[None]:
    """Let a copy of the model be the Trainer's model; loops may run, and afterwards the Trainer is as it was.

    What hooks see is the user's own: the Trainer with its clock, settings and data, optimizers and schedulers (copies
    that belong to the copy), precision, device, callbacks and loggers. Its callbacks are not called, loggers write
    nothing, random states are put back, and the copy is alone: in many processes it waits for none of the others.

    Args:
        trainer: The Trainer of the run.
        model: The copy.
        watching: Callbacks that are called instead of the Trainer's.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    held = [trainer, trainer.state, trainer.fit_loop, epoch_loop, trainer._accelerator_connector]  # noqa: SLF001
    before = [dict(vars(x)) for x in held]
    with same_random(), quiet(), alone(), _undisturbed(), silent_wandb(), _told(trainer, watching):
        try:
            model.trainer = trainer
            model.__dict__["print"] = nothing
            strategy = _strategy(trainer, model)
            trainer._logger_connector = _connector(trainer)  # noqa: SLF001
            trainer._accelerator_connector.strategy = strategy  # noqa: SLF001
            trainer.loggers = _silent_loggers(trainer)
            trainer.__dict__["profiler"] = PassThroughProfiler()
            trainer.__dict__["save_checkpoint"] = nothing
            epoch_loop._results = type(epoch_loop._results)(training=True)  # noqa: SLF001
            strategy.model_to_device()
            _optimizers_to_device(strategy.optimizers, strategy.root_device)
            yield
        finally:
            for x, values in zip(held, before, strict=True):
                for name in vars(x).keys() - values.keys():
                    del vars(x)[name]
                vars(x).update(values)
            model.__dict__.pop("print", None)
            model.trainer = None


@contextmanager
def attached(trainer: pl.Trainer, model: pl.LightningModule) -> Iterator[None]:
    """Let a copy whose forward is called by itself read the run; what it logs goes nowhere."""
    mute = dict.fromkeys(("log", "log_dict", "print"), nothing)
    loggers = trainer.loggers
    trainer.loggers = _silent_loggers(trainer)
    with patch.dict(model.__dict__, mute):
        model.trainer = trainer
        try:
            yield
        finally:
            model.trainer = None
            trainer.loggers = loggers


def _silent_loggers(trainer: pl.Trainer) -> list[Any]:
    return [Silent(logger) for logger in trainer.loggers]


def _strategy(trainer: pl.Trainer, model: pl.LightningModule) -> Strategy:
    """The run's strategy with the copy in it; that of one device where the run has many processes."""
    run = trainer.strategy
    strategy: Strategy = copy.copy(run)
    if trainer.world_size > 1:
        strategy = SingleDeviceStrategy(run.root_device, run.accelerator)
    strategy.precision_plugin = copy.deepcopy(run.precision_plugin)
    strategy.connect(model)
    strategy.optimizers = []
    strategy.lr_scheduler_configs = []
    pairs = zip(trainer.lightning_module.parameters(), model.parameters(), strict=False)
    instead: dict[int, Any] = {id(trainer.lightning_module): model, **{id(p): of_copy for p, of_copy in pairs}}
    try:
        optimizers = [copy_optimizer(optimizer, instead) for optimizer in trainer.optimizers]
        schedulers = copy.deepcopy(trainer.lr_scheduler_configs, instead)
    except Exception:  # one that cannot be copied is made anew, where that can be
        with suppress(Exception):
            strategy.setup_optimizers(trainer)
        return strategy
    strategy.optimizers = optimizers
    strategy.lr_scheduler_configs = schedulers
    return strategy


def _connector(trainer: pl.Trainer) -> Any:
    """What the run has logged so far, to be added to."""
    connector = copy.copy(trainer._logger_connector)  # noqa: SLF001
    if connector._first_loop_iter is not None:  # noqa: SLF001  # inside of a batch: what it has logged counts
        _ = connector.callback_metrics, connector.logged_metrics, connector.progress_bar_metrics
    for name, value in vars(connector).items():
        if isinstance(value, dict):
            setattr(connector, name, dict(value))
    return connector


def twins(loaders: CombinedLoader) -> CombinedLoader:
    """The same loaders, with iterators of their own."""
    made = CombinedLoader(loaders.iterables, loaders._mode)  # noqa: SLF001
    made.flattened = [_twin(loader) for loader in loaders.flattened]
    return made


def _twin(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    twin._iterator = None  # of workers that persist  # noqa: SLF001
    return twin


@contextmanager
def rewound(loaders: Any) -> Iterator[None]:
    """With the random states of loaders put back at the end."""
    holders = tree_leaves(getattr(loaders, "iterables", loaders))
    for name in ("sampler", "batch_sampler", "sampler"):  # a batch sampler has a sampler
        holders += [getattr(holder, name, None) for holder in holders]
    found = [getattr(holder, "generator", None) for holder in holders]
    states = [(x, x.get_state()) for x in found if isinstance(x, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def same_random() -> Iterator[None]:
    """With the random states of Python, NumPy and torch put back at the end, whatever ends it."""
    isolated = isolate_rng()
    isolated.__enter__()
    try:
        yield
    finally:
        isolated.__exit__(None, None, None)  # which puts nothing back where it is told of an error


@contextmanager
def _told(trainer: pl.Trainer, watching: Sequence[pl.Callback]) -> Iterator[None]:
    """With others in the place of the Trainer's callbacks: hooks may look at those, but they must not see the copy."""
    call_hooks = call._call_callback_hooks  # noqa: SLF001

    def tell(caller: pl.Trainer, hook: str, *args: Any, **kwargs: Any) -> None:
        if caller is not trainer:
            call_hooks(caller, hook, *args, **kwargs)
            return
        for callback in watching:
            getattr(callback, hook)(trainer, trainer.lightning_module, *args, **kwargs)

    with patch.object(call, "_call_callback_hooks", tell):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Without the other ranks: what runs here waits for none of them."""
    with patch.object(torch.distributed, "is_initialized", return_value=False):
        yield


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let a cluster's signal to save and requeue the run wait until its own model is back."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says and warns of."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
