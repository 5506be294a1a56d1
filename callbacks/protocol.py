"""What compressing callbacks expect of each other, and the functions that ask them.

A callback has a part in it by having these members: there is nothing to inherit. Callbacks without them are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.deploy.verify import Artifact
from lightning_compress.phase import Clock, Phase
from lightning_compress.structure.record import Record

__all__ = [
    "Compressing",
    "Explaining",
    "Exporting",
    "Following",
    "Phased",
    "Settling",
    "State",
    "Steerable",
    "Targeted",
    "all_callbacks",
    "averages",
    "compressing",
    "compressing_phases",
    "compression_progress",
    "exporting",
    "phases_of",
    "steerable",
    "targeted",
]


State = dict[str, Any]
"""What a callback keeps or saves: plain values and tensors, so that ``weights_only=True`` loads it."""


@runtime_checkable
class Phased(Protocol):
    """A callback that acts during phases of the run.

    Args:
        compresses: Whether the model is compressed in them: from the first such phase on it is no longer the dense one.
    """

    compresses: bool

    def phases(self) -> Sequence[tuple[str, Phase]]:
        """Its phases with their names; phases of different names may not overlap."""
        ...


@runtime_checkable
class Following(Protocol):
    """A callback that holds on to something whose shape is that of a parameter, or to modules that may be removed."""

    def follow(self, pl_module: pl.LightningModule, record: Record) -> None:
        """The model has just changed its shape, by this record; also where it was this callback that changed it."""
        ...


@runtime_checkable
class Targeted(Protocol):
    """A callback that is asked for something that a run may fail to reach: it is judged when ``fit`` ends.

    Members that it may have beside these are ``strict``, whether a target that is not reached is an error then (False
    without it), and ``shortfalls``, as :class:`Explaining` has it.
    """

    def asked(self) -> Mapping[str, float | str]:
        """What is asked for, in plain values by what they count: ``{"sparsity": 0.9}``."""
        ...

    def stands(self) -> Mapping[str, float | str]:
        """What of it stands now, in the same words.

        Of a run that is interrupted one process may ask alone, so that nothing may be gathered from the others here.
        """
        ...

    @property
    def reached(self) -> bool:
        """Whether all is done that will be."""
        ...


@runtime_checkable
class Explaining(Targeted, Protocol):
    """One that knows better than by ``reached`` which of its targets it misses, and why."""

    def shortfalls(self) -> Mapping[str, str]:
        """The targets that what stands falls short of, each with the reason in words; empty: the run was too short."""
        ...


@runtime_checkable
class Compressing(Phased, Following, Targeted, Protocol):
    """A callback that compresses the model: ``compresses`` is True.

    Members that it may have beside those of the protocol are ``gate_stopping``, whether EarlyStopping waits as a
    ModelCheckpoint does (True without it), and those that :class:`Targeted` names.

    Args:
        gate_checkpoints: Whether a ModelCheckpoint with a monitor waits until it has ``reached`` its target.

    Example:
        A callback of a user's own that zeroes the biases, and keeps them zero:

        >>> class ZeroBias(pl.Callback):
        ...     compresses, gate_checkpoints = True, True
        ...     reached = False
        ...     def phases(self):
        ...         return [("zero the biases", Phase(0.5, 0.5))]
        ...     def asked(self):
        ...         return {"biases": 0.0}
        ...     def stands(self):
        ...         return {"biases": 0.0 if self.reached else 1.0}
        ...     def follow(self, pl_module, record):
        ...         pass  # it holds on to nothing of the model
        ...     def keep(self):
        ...         return {"reached": self.reached}
        ...     def go_back(self, pl_module, kept):
        ...         self.reached = kept["reached"]
        ...     def on_train_batch_end(self, trainer, pl_module, *_):
        ...         self.reached = trainer.global_step >= trainer.estimated_stepping_batches / 2
        ...         for name, p in pl_module.named_parameters() if self.reached else ():
        ...             p.data *= not name.endswith("bias")
        >>> isinstance(ZeroBias(), Compressing)
        True
        >>> from lightning_compress.testing import check_callback
        >>> check_callback(ZeroBias())
    """

    gate_checkpoints: bool

    def keep(self) -> State | None:
        """What it takes to come back to now, besides the weights; None where nothing comes back."""
        ...

    def go_back(self, pl_module: pl.LightningModule, kept: State) -> None:
        """Return to what was kept earlier in this very run; the weights are as they were then."""
        ...


@runtime_checkable
class Steerable(Compressing, Protocol):
    """A callback that another may steer, such as AccuracyGuard: it then decides how far to compress, step by step.

    It is steered during the last of its ``phases``.

    Args:
        lever: What is steered; a key of ``asked``: ``"sparsity"``, up to the one asked for, or ``"bits"``.
        goal: The level that it is steered to; None while it follows a schedule of its own.
    """

    lever: str

    @property
    def goal(self) -> float | None: ...  # noqa: D102

    def check_level(self, level: float) -> None:
        """Raise a ValueError or TypeError if it cannot compress to a level."""
        ...

    def steer(self, level: float | None) -> None:
        """Compress to a level from the next batch on, and no further; None: nothing steers it any more."""
        ...


@runtime_checkable
class Exporting(Protocol):
    """A callback that writes the trained model as files, and has done so by ``on_fit_end``.

    Args:
        formats: Names of the formats, the one that is reported first in front.
        artifacts: What was written.
        metrics: What validation logged with each file in place of the model, by format.
        failures: Why a format was not written, by format.

    A member that it may have beside these is ``trained``, what validation logged with the trained model in PyTorch.
    """

    formats: Sequence[str]
    artifacts: Sequence[Artifact]
    metrics: Mapping[str, Mapping[str, float]]
    failures: Mapping[str, str]


@runtime_checkable
class Settling(Protocol):
    """A callback that holds on to its model, also to one that was trained in processes of its own, as by ``ddp_spawn``.

    The process that launched those gives the callback the state that a checkpoint would have, and what else it
    ``leaves``: names of attributes with results of a run that are no part of a state, which any callback may have.
    """

    def settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be what the run has made of it: the model is trained, and the state is loaded."""
        ...


@runtime_checkable
class Concluding(Protocol):
    """A callback that writes down how a run ended, also of one that Ctrl-C ended; last of all, after the verdict."""

    def conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write."""
        ...


_KINDS = (Phased, Following, Targeted, Compressing)
_MEMBERS = [name for kind in _KINDS for name in {**vars(kind), **kind.__annotations__}]
_MEMBERS = [name for name in _MEMBERS if not name.startswith("_")]


def all_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """Every callback of a Trainer, which sets them where type checkers do not look."""
    return trainer.callbacks  # type: ignore[attr-defined]


def compressing(trainer: pl.Trainer) -> list[Compressing]:
    """The callbacks that compress.

    Raises:
        TypeError: If one says that it does, and lacks a part of the protocol.
    """
    found: list[Compressing] = []
    for callback in all_callbacks(trainer):
        if getattr(callback, "compresses", False) is True:
            if not isinstance(callback, Compressing):
                missing = ", ".join(name for name in _MEMBERS if not hasattr(callback, name))
                raise TypeError(
                    f"{type(callback).__name__}.compresses=True, but it has no {missing}. Accepted is a callback with "
                    "all members of lightning_compress.callbacks.Compressing. Add them, and prove them by "
                    "lightning_compress.testing.check_callback."
                )
            found.append(callback)
    return found


def targeted(trainer: pl.Trainer) -> list[Targeted]:
    """The callbacks that are judged when ``fit`` ends."""
    compressing(trainer)  # refuses one that lacks a part
    return [callback for callback in all_callbacks(trainer) if isinstance(callback, Targeted)]


def steerable(trainer: pl.Trainer, lever: str) -> list[Steerable]:
    """The callbacks that can be steered by a lever, ``"sparsity"`` or ``"bits"``."""
    return [c for c in all_callbacks(trainer) if isinstance(c, Steerable) and c.lever == lever]


def exporting(trainer: pl.Trainer) -> list[Exporting]:
    """The callbacks that write the trained model as files."""
    return [callback for callback in all_callbacks(trainer) if isinstance(callback, Exporting)]


def phases_of(trainer: pl.Trainer) -> list[tuple[str, Phase]]:
    """Every phase of every callback, with its name."""
    return [item for callback in all_callbacks(trainer) if isinstance(callback, Phased) for item in callback.phases()]


def compressing_phases(trainer: pl.Trainer) -> list[Phase]:
    """The phases in which the model is compressed."""
    return [phase for callback in compressing(trainer) for _, phase in callback.phases()]


def compression_progress(trainer: pl.Trainer, clock: Clock) -> float:
    """The largest progress of the phases that compress: 0 or more once compression has begun."""
    return max((phase.progress(clock) for phase in compressing_phases(trainer)), default=-math.inf)


def averages(trainer: pl.Trainer) -> list[nn.Module]:
    """The averaged copies of the module that callbacks of Lightning keep."""
    kinds = WeightAveraging | StochasticWeightAveraging
    # Lightning has no public name for the averaged copy
    found = [c._average_model for c in all_callbacks(trainer) if isinstance(c, kinds)]  # noqa: SLF001
    present = [average for average in found if average is not None]
    return [average.module if isinstance(average, AveragedModel) else average for average in present]
