"""How far a task is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["counted", "tell"]

Model = TypeVar("Model")


def tell(text: str) -> None:
    """A line."""
    from rich.console import Console

    Console().print(text, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def counted(
    evaluate: Callable[[Model], float], what: str, total: int | None = None
) -> Iterator[Callable[[Model], float]]:
    """An evaluation under a bar that counts its calls; where no bar can be drawn, a line at the end says how many.

    Args:
        evaluate: What is called.
        what: Is done, in a few words.
        total: How many calls there will be, if that is known.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    # in a notebook Rich needs a package of widgets
    with Progress(*columns, console=console, disable=console.is_jupyter) as progress:
        task = progress.add_task(what, total=total)

        def call(model: Model) -> float:
            value = evaluate(model)
            progress.advance(task)
            return value

        yield call
