"""Add the callbacks of a recipe to a Trainer that does not know of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_compress.checks import check_list, check_path
from lightning_compress.recipes import read_recipe, recipes, split_words
from lightning_compress.recipes import recipe as callbacks_of

from .live_shape import check_package
from .protocol import all_callbacks, compressing
from .run import is_launched

__all__ = ["Recipe", "from_hydra", "from_variable"]


class Recipe(pl.Callback):
    """Adds the callbacks of a recipe to the Trainer, where it has none that compress.

    For a Trainer that is configured elsewhere: by LightningCLI, with ``--trainer.callbacks+=Recipe`` behind
    ``--trainer.callbacks.recipe=prune_int8``, or by an application that knows nothing of it, with the variable
    ``LIGHTNING_COMPRESS=prune_int8``. A script takes :func:`lightning_compress.recipe`. Callbacks that the Trainer has
    already are not added again: where one compresses, the recipe is left out as a whole.

    Args:
        recipe: The name of a recipe of this package, such as ``"prune_int8"``, or the path of a YAML file.
        overrides: Changes, as on Hydra's command line: ``["prune.sparsity=0.8", "finetune=null"]``.

    Raises:
        ValueError: If there is no such recipe, or it names what its callbacks do not take.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Recipe("prune_int8", ["prune.sparsity=0.8"])], logger=False,
        ...                      enable_checkpointing=False)
    """

    def __init__(self, recipe: str = "prune_int8", overrides: Sequence[str] = ()) -> None:
        check_path("Recipe.recipe", recipe, f"one of {', '.join(recipes())}, or the path of a YAML file")
        check_list("Recipe.overrides", overrides, str, "such as 'prune.sparsity=0.8'")
        self.recipe = recipe
        self.callbacks = callbacks_of(recipe, *overrides)
        self.asked_by = f"Recipe({recipe!r})"
        self.is_expected = False  # that the Trainer has them already

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the callbacks behind this one, where the Trainer's loop over its callbacks comes to them next.

        Raises:
            ValueError: If the Trainer launches processes, whose callbacks the one of the user would not have.
        """
        check_package(trainer, self)
        if any(callback is own for callback in all_callbacks(trainer) for own in self.callbacks):
            return
        theirs = compressing(trainer)
        if theirs:
            names = ", ".join(type(callback).__name__ for callback in theirs)
            if not self.is_expected:
                _say(f"{self.asked_by}: nothing is added, because the Trainer has {names}.")
            return
        if is_launched(trainer):
            raise ValueError(
                f"{self.asked_by} with strategy='ddp_spawn', 'ddp_fork' or 'ddp_notebook': its callbacks would be "
                "those of other processes. Accepted are strategies that launch none, such as Trainer(strategy='ddp'); "
                "or give the Trainer the callbacks themselves: callbacks=lightning_compress.recipe(...)."
            )
        kinds = {type(callback) for callback in all_callbacks(trainer)}
        added = [callback for callback in self.callbacks if type(callback) not in kinds]
        present = all_callbacks(trainer)
        at = present.index(self) + 1
        present[at:at] = added
        _say(f"{self.asked_by} adds {', '.join(type(callback).__name__ for callback in added)} to the Trainer.")


def from_variable(words: str) -> Recipe:
    """What the value of the variable LIGHTNING_COMPRESS asks for.

    Raises:
        ValueError: Like :class:`Recipe`.
    """
    try:
        name, overrides = split_words(words)
        made = Recipe(name, overrides)
    except ValueError as error:
        raise ValueError(f"LIGHTNING_COMPRESS={words!r}: {error}") from error
    made.asked_by = f"LIGHTNING_COMPRESS={words!r}"
    return made


def from_hydra(names: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """What ``+compression=`` of a Hydra application asks for, for a Trainer that was not given it.

    An application that keeps its callbacks elsewhere than at ``callbacks``, as in ``trainer.callbacks``, does not see
    what Hydra composed there.

    Raises:
        ValueError: Like :class:`Recipe`.
    """
    asked_by = f"+compression={','.join(names)}"
    try:
        parts = [Recipe(name, [o for o in overrides if _is_of(o, name)]) for name in names]
    except ValueError as error:
        raise ValueError(f"{asked_by}: {error}") from error
    made = parts[0]
    by_kind = {type(callback): callback for part in parts for callback in part.callbacks}
    made.callbacks = list(by_kind.values())
    made.asked_by = asked_by
    made.is_expected = True
    return made


def _is_of(override: str, name: str) -> bool:
    """Whether a change is of a callback of a recipe."""
    return override.lstrip("~").partition("=")[0].partition(".")[0] in read_recipe(name)


def _say(text: str) -> None:
    """In Lightning's log; by itself where an application has turned that off."""
    if logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.INFO):
        rank_zero_info(text)
    else:
        rank_zero_only(lambda: print(text, file=sys.stderr))()
