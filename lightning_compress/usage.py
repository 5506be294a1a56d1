"""What the command says of itself, and its short names for longer calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import takewhile
from textwrap import wrap

from lightning_compress.recipes import recipes

__all__ = ["SHORT", "TASKS", "describe", "expand", "usage"]

TASKS = {
    "train": "train, compress, prove and export; what is done without a task",
    "sensitivity": "show how much compression each layer tolerates",
    "search": "meet a budget of bytes, time or accuracy, layer by layer",
    "pareto": "draw the frontier of the runs in a folder",
}
SHORT = {"demo": ["experiment=mnist_prune_int8", "hydra.run.dir=outputs/demo"]}

_USAGE = """\
Makes any LightningModule smaller while it trains: prunes, quantizes and exports
it, and runs each file in its runtime to compare it with the model.

lightning-compress demo [name=value ...]
lightning-compress [task=...] [compression=...] [name=value ...]

Tasks:
{tasks}

Examples:
  lightning-compress demo
      a small network on 5,000 images, for two minutes, into outputs/demo
  lightning-compress model._target_=my.Module data._target_=my.Data \\
      compression=prune_int8 trainer.max_epochs=20
      your own classes, importable from the current folder
  lightning-compress demo compression.prune.sparsity=0.8 seed=1
      other values of a recipe and of the run
  lightning-compress -m experiment=mnist_prune_int8 seed=0,1,2
      a sweep: a run for each value, and a table
  lightning-compress task=search model._target_=my.Module \\
      data._target_=my.Data budget.bytes=20000
      the best model that takes 20,000 bytes at most

Recipes, for compression=...:
{recipes}

The arguments of a recipe, and all that can be set:
  lightning-compress compression=int8 --cfg job --package compression
  lightning-compress --cfg job
A name that is not there yet is added by a plus: +trainer.limit_val_batches=2.

  --help        this page
  --version     the version of lightning-compress
  --hydra-help  the flags of Hydra, which composes the run: --multirun, --cfg
HYDRA_FULL_ERROR=1 in the environment shows where an error was raised."""


def usage() -> str:
    """The page of ``--help``, at most 80 columns wide."""
    return _USAGE.format(tasks=_table(TASKS), recipes=_table({name: describe(name) for name in recipes()}))


def describe(name: str) -> str:
    """What a recipe does: the comment behind its command.

    Example:
        >>> describe("prune_int8")
        'pruned, fine-tuned, then calibrated and trained in int8'
    """
    text = files("lightning_compress.conf").joinpath("compression", f"{name}.yaml").read_text()
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    return next(line for line in comments if not line.startswith(("@package", "lightning-compress")))


def expand(words: Sequence[str]) -> list[str]:
    """The words of a call, with a short name spelt out that stands behind none but flags.

    The address of a recipe's argument in other applications, ``callbacks.prune.sparsity``, is that of ours, too. A plus
    before one of ours adds an argument that the recipe lacks, and sets one that it has.

    Example:
        >>> expand(["demo", "seed=1"])
        ['experiment=mnist_prune_int8', 'hydra.run.dir=outputs/demo', 'seed=1']
        >>> expand(["callbacks.prune.sparsity=0.8", "callbacks.checkpoint.save_last=false"])
        ['compression.prune.sparsity=0.8', 'callbacks.checkpoint.save_last=false']
    """
    flags = list(takewhile(lambda word: word.startswith("-"), words))
    rest = list(words[len(flags) :])
    if rest and rest[0] in SHORT:
        rest[:1] = SHORT[rest[0]]
    return [*flags, *map(_ours, rest)]


def _ours(word: str) -> str:
    """A word of a call with the address of a recipe's argument as it is in our configuration."""
    address = re.match(r"[+~]*callbacks\.(\w+)", word)
    if address is not None and address[1] in _names():
        word = word.replace("callbacks.", "compression.", 1)
    return f"+{word}" if word.startswith("+compression.") else word


@cache
def _names() -> set[str]:
    """What the callbacks of the recipes are called."""
    folder = files("lightning_compress.conf").joinpath("compression")
    return {name for path in folder.iterdir() for name in re.findall(r"^(\w+):", path.read_text(), re.MULTILINE)}


def _table(rows: dict[str, str]) -> str:
    """Names and what they are."""
    lines = []
    for name, text in rows.items():
        first, *more = wrap(text, 62)
        lines += [f"  {name:<12}  {first}", *(f"{'':<16}{line}" for line in more)]
    return "\n".join(lines)
