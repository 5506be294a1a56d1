"""What pruning during training can be asked for: the values of its arguments, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_compress.checks import (
    check_by_name,
    check_flag,
    check_instance,
    check_names,
    check_number,
    check_one_of,
    check_whole_number,
)
from lightning_compress.phase import Phase
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.patterns import Pattern
from lightning_compress.pruning.schedules import Cubic, Schedule

__all__ = ["check_arguments", "check_sharded", "schedule_for"]


def schedule_for(name: str, sparsity: float | Schedule | None, pattern: Pattern) -> Schedule:
    """The schedule of a sparsity: cubic for a number; without one, up to 0.9 or the most that the pattern allows.

    Args:
        name: Whose argument ``sparsity`` it is, for the message.
        sparsity: A final sparsity, a schedule, or None.
        pattern: In what shape weights are dropped.

    Raises:
        ValueError: If the final sparsity is no share, or more than the pattern can drop.
    """
    most = pattern.max_sparsity
    schedule = sparsity if isinstance(sparsity, Schedule) else None
    final: Any = schedule.final if schedule is not None else sparsity
    if final is None:
        final = min(0.9, most)
    accepted = "a share in 0..1 (0.9 drops nine weights in ten), or a Schedule such as Linear(0.9)"
    check_number(f"{name}.sparsity", final, accepted, low=0, high=1)
    if final > most:
        raise ValueError(
            f"{name}.sparsity={sparsity!r}: {pattern} drops a share of {most:g} at most. Lower the sparsity or take "
            "another pattern."
        )
    return Cubic(final) if schedule is None else schedule


def check_arguments(  # noqa: PLR0913  # the settings that have a range, each by name
    name: str,
    *,
    criterion: Criterion,
    pattern: Pattern,
    phase: Phase,
    scope: str,
    every: int,
    floor: float,
    targets: Mapping[str, float],
    rewind: float | None,
    include: Sequence[str],
    exclude: Sequence[str],
    **flags: bool,
) -> None:
    """Raise unless these can be arguments of ``GradualPruning``; ``name`` is how the message calls it.

    What it may be or not be, such as ``keep_first``, are the ``flags``.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If an argument is of the wrong kind.
    """
    for field, names in (("include", include), ("exclude", exclude)):
        check_names(f"{name}.{field}", names)
    for field, flag in flags.items():
        check_flag(f"{name}.{field}", flag)
    objects = (("criterion", criterion, Criterion), ("pattern", pattern, Pattern), ("phase", phase, Phase))
    for field, value, kind in objects:
        check_instance(f"{name}.{field}", value, kind, f"a {kind.__name__}, an object of that class and not its name")
    check_by_name(f"{name}.targets", targets, "a dict of sparsities by name pattern, such as {'head': 0.5}")
    meaning = "'global' ranks all layers together, 'layer' each by itself, 'erk' gives larger ones a higher sparsity."
    check_one_of(f"{name}.scope", scope, ("global", "layer", "erk"), meaning)
    most = pattern.max_sparsity
    if scope == "erk" and most < 1:
        raise ValueError(
            f"{name}.scope='erk': with {pattern} no layer can be sparser than another. Accepted are 'global' and "
            "'layer'."
        )
    check_whole_number(f"{name}.every", every, "a whole number of optimizer steps from 1", low=1)
    check_number(f"{name}.floor", floor, "a share in 0..1 of the average density", low=0, high=1)
    for key, target in targets.items():
        accepted = f"a share in 0..{most:g} of the layer's weights"
        check_number(f"{name}.targets[{key!r}]", target, accepted, low=0, high=min(1.0, most))
    if rewind is not None:
        accepted = f"a point in 0..{phase.begin:g}, before the phase begins and in its unit"
        check_number(f"{name}.rewind", rewind, accepted, low=0, high=phase.begin)


def check_sharded(name: str, criterion: Criterion, rewind: float | None) -> None:
    """Raise unless these can be arguments of ``GradualPruning`` where each process holds a part of every weight.

    Raises:
        ValueError: If one needs all of it.
    """
    if criterion.needs_data:
        raise ValueError(
            f"{name}.criterion={criterion} with strategy=ModelParallelStrategy: each process sees only a part of a "
            "layer. Accepted are criteria that read weights alone, such as Magnitude() or LAMP(). Take one, or "
            "Trainer(strategy='ddp')."
        )
    if rewind is not None:
        raise ValueError(
            f"{name}.rewind={rewind!r} with strategy=ModelParallelStrategy: each process would remember only its part "
            "of the weights. Accepted is None. Leave rewind out, or take Trainer(strategy='ddp')."
        )
