"""The properties of the behaviour matrix: what training with a method must keep, one function each.

Every one of them takes a cell, the runs that the cells share, and an empty folder. With a cell of ``"plain"`` it says
whether the module has the property without any callback: nothing of ours is called then.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import lightning_compress
from lightning_compress.callbacks import Export, GradualPruning
from lightning_compress.quantization.model import quantization_of

from ..harness import (
    NOT_CAPTURED,
    SaveAfter,
    SeedEachBatch,
    accumulate_by_hand,
    assert_agrees,
    assert_compiled_as_eager,
    assert_equal_outputs,
    compile_inner,
    differences,
    in_two_processes,
    inputs_of,
    make_trainer,
    outputs,
    snapshot,
)
from ..zoo import BATCHES, MODULES
from .methods import BASES, METHODS, Method

Run = tuple[pl.Trainer, pl.LightningModule, Path]
END = "end.ckpt"


@dataclass(frozen=True)
class Cell:
    """One method, one module of the zoo, one property."""

    method: str
    module: str
    property: str
    full: bool = False

    @property
    def how(self) -> Method:
        return METHODS.get(self.method) or BASES[self.method]

    @property
    def is_plain(self) -> bool:
        return self.method == "plain"

    def some(self, options: tuple[Any, ...]) -> tuple[Any, ...]:
        """One of the options, which rotates from cell to cell; all of them in a full run."""
        names = [*METHODS, *BASES]
        number = names.index(self.method) + list(MODULES).index(self.module)
        return options if self.full else (options[number % len(options)],)

    def make_module(self) -> pl.LightningModule:
        """Always with the same weights."""
        torch.manual_seed(0)
        return self.how.kinds[self.module]()

    def make_trainer(self, folder: Path, *extra: pl.Callback, **options: Any) -> pl.Trainer:
        """The extra callbacks stand behind the method's."""
        callbacks = [SeedEachBatch(), *self.how.callbacks(self.module), *extra]
        settings = {"callbacks": callbacks, "max_epochs": self.how.epochs, **self.how.options}
        return make_trainer(folder, **{**settings, **options})

    def assert_reached(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.how.reached(trainer, module, self.module)
        assert all(torch.isfinite(p).all() for p in module.parameters())


class Runs:
    """One whole run of each method and module, with its checkpoints, trained once and only read."""

    def __init__(self, make_folder: Callable[[str], Path], cells: list[Cell]) -> None:
        self.make_folder = make_folder
        self.cells = cells
        self._made: dict[tuple[str, str], Run] = {}
        self._two_processes: dict[Cell, str] = {}

    def __call__(self, cell: Cell) -> Run:
        key = cell.method, cell.module
        if key not in self._made:
            folder = self.make_folder("run")
            saver = SaveAfter(folder, (*cell.how.saved, cell.how.inert))
            module, trainer = cell.make_module(), cell.make_trainer(folder, saver)
            trainer.fit(module)
            trainer.save_checkpoint(folder / END)
            self._made[key] = trainer, module, folder
        return self._made[key]

    def base(self, cell: Cell) -> Run:
        """The run that a cell's is until its method begins."""
        return self(Cell(cell.how.base, cell.module, cell.property))

    def two_processes(self, cell: Cell) -> str:
        """What a cell came to in two processes; all cells of the session share one group of them."""
        if cell not in self._two_processes:
            cells = self.cells if cell in self.cells else [cell]
            calls = [("tests.behaviour.properties", "alike", [each.method, each.module]) for each in cells]
            found = in_two_processes(calls, self.make_folder("ddp"))
            self._two_processes.update(zip(cells, found, strict=True))
        return self._two_processes[cell]


def inert(cell: Cell, runs: Runs, folder: Path) -> None:
    """Until the method begins the run is bit for bit the one without it; in the end it is another."""
    _, ours, where = runs(cell)
    _, plain, plainly = runs.base(cell)
    saved, expected = (torch.load(f / f"{cell.how.inert}.ckpt", weights_only=True) for f in (where, plainly))
    for key in ("state_dict", "optimizer_states"):
        assert not differences(saved[key], expected[key])
    if not cell.is_plain and cell.module not in cell.how.whole:
        assert differences(outputs(ours), outputs(plain))


def target(cell: Cell, runs: Runs, folder: Path) -> None:
    """What was asked for is reached, and what is dropped in the end was so in the last checkpoint of the run too."""
    trainer, module, folder = runs(cell)
    cell.assert_reached(trainer, module)
    saved = torch.load(folder / f"{cell.how.saved[-1]}.ckpt", weights_only=True)["state_dict"]
    for layer, weight in masked(trainer, module, cell):
        assert saved[layer].shape != weight.shape or not saved[layer][weight == 0].any(), layer


def masked(trainer: pl.Trainer, module: pl.LightningModule, cell: Cell) -> list[tuple[str, torch.Tensor]]:
    """The weights with masks that only ever drop, by the name of the parameter."""
    pruning = [callback for callback in trainer.callbacks if isinstance(callback, GradualPruning)]
    names = {id(p): key for key, p in module.named_parameters()}
    layers = pruning[0].masks.layers if pruning and cell.how.zeros else []
    return [(names[id(layer.weight)], layer.weight.detach()) for layer in layers]


def resume(cell: Cell, runs: Runs, folder: Path) -> None:
    """Resumed in any phase a run ends bit-identically: weights, optimizers, callbacks."""
    trainer, module, saved = runs(cell)
    expected = snapshot(trainer, module)
    for batches in cell.some(cell.how.saved):
        again, trainer_again = cell.make_module(), cell.make_trainer(folder)
        trainer_again.fit(again, ckpt_path=saved / f"{batches}.ckpt", weights_only=True)
        assert not differences(expected, snapshot(trainer_again, again)), f"resumed after {batches} batches"


def test(cell: Cell, runs: Runs, folder: Path) -> None:
    """One trainer and one module test checkpoints of any phase and shape, forth and back."""
    _, trained, saved = runs(cell)
    first, last = f"{cell.how.saved[0]}.ckpt", f"{cell.how.saved[-1]}.ckpt"
    trainer, module = cell.make_trainer(folder), cell.make_module()
    found: dict[str, Any] = {}
    for path in (END, first, END, last, first):
        result = trainer.test(module, ckpt_path=saved / path, verbose=False)
        assert found.setdefault(path, result) == result
        state = torch.load(saved / path, weights_only=True)["state_dict"]
        assert not differences(state, module.state_dict())
    assert found[END] != found[first]
    assert found[END] == cell.make_trainer(folder).test(copy.deepcopy(trained), verbose=False)
    plain = make_trainer(folder, callbacks=[])
    assert found[first] == plain.test(cell.make_module(), ckpt_path=saved / first, verbose=False)


def load(cell: Cell, runs: Runs, folder: Path) -> None:
    """load_from_checkpoint needs no Trainer, and plain Lightning loads the same file where its shapes are the same."""
    _, trained, saved = runs(cell)
    kind = cell.how.kinds[cell.module]
    if not cell.is_plain:
        loaded = lightning_compress.load_from_checkpoint(kind, saved / END)
        assert not differences(loaded.state_dict(), trained.state_dict())
        assert_equal_outputs(loaded, trained)
    dense = cell.make_module()
    dense.configure_model()
    if _shapes(dense) == _shapes(trained):
        plain = kind.load_from_checkpoint(saved / END)
        assert not differences(plain.state_dict(), trained.state_dict())
    else:
        with pytest.raises(RuntimeError, match=r"size mismatch|Missing key|Unexpected key"):
            kind.load_from_checkpoint(saved / END)


def _shapes(module: pl.LightningModule) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def copies(cell: Cell, runs: Runs, folder: Path) -> None:
    """A deepcopy and a pickled module compute the same and share nothing."""
    _, trained, _ = runs(cell)
    made = [copy.deepcopy(trained)]
    if cell.module == "foreign":  # torch itself pickles no parametrized module
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
            pickle.dumps(cell.make_module())
    else:
        made.append(pickle.loads(pickle.dumps(trained)))
    before = [y.clone() for y in outputs(trained)]
    for copied in made:
        assert not differences(outputs(copied), before)
        if not cell.is_plain and (quantization := quantization_of(copied)) is not None:
            with torch.no_grad():
                for log in quantization.learned().values():
                    log += 1
            assert bool(differences(outputs(copied), before)) == bool(quantization.learned())
            quantization.enable(False)
            assert differences(outputs(copied), before)
        with torch.no_grad():
            for p in copied.parameters():
                p += 1
        assert not differences(outputs(trained), before)


def accumulate(cell: Cell, runs: Runs, folder: Path) -> None:
    """Gradient accumulation; where optimization is manual, Lightning leaves it to the module."""
    module = cell.make_module()
    trainer = cell.make_trainer(folder, **({"accumulate_grad_batches": 2} if module.automatic_optimization else {}))
    if not module.automatic_optimization:
        accumulate_by_hand(module, trainer)
    trainer.fit(module)
    num_batches = BATCHES * cell.how.epochs
    assert trainer.global_step in (num_batches // 2, num_batches)
    cell.assert_reached(trainer, module)


def bf16(cell: Cell, runs: Runs, folder: Path) -> None:
    """Mixed precision."""
    module, trainer = cell.make_module(), cell.make_trainer(folder, precision="bf16-mixed")
    trainer.fit(module)
    cell.assert_reached(trainer, module)


def ema(cell: Cell, runs: Runs, folder: Path) -> None:
    """Averaged weights are compressed too, before or behind us, and the run resumes bit-identically."""
    num_batches = BATCHES * cell.how.epochs
    saved = cell.how.saved

    def make(where: Path, first: bool) -> pl.Trainer:
        trainer = cell.make_trainer(where, SaveAfter(where, (*saved, num_batches)))
        trainer.callbacks.insert(0 if first else -1, EMAWeightAveraging(decay=0.8))
        return trainer

    for first in cell.some((True, False)):
        module, trainer = cell.make_module(), make(folder, first)
        trainer.fit(module)
        cell.assert_reached(trainer, module)
        averaged = torch.load(folder / f"{num_batches}.ckpt", weights_only=True)["state_dict"]
        for layer, weight in masked(trainer, module, cell):
            assert not averaged[layer][weight == 0].any(), layer
        for batches in cell.some(saved):
            again, trainer_again = cell.make_module(), make(folder / "again", first)
            trainer_again.fit(again, ckpt_path=folder / f"{batches}.ckpt", weights_only=True)
            assert not differences(snapshot(trainer, module), snapshot(trainer_again, again)), batches


def compiled(cell: Cell, runs: Runs, folder: Path) -> None:
    """An inner part under torch.compile."""
    module = compile_inner(cell.make_module(), cell.how.backend)
    trainer = cell.make_trainer(folder)
    trainer.fit(module)
    cell.assert_reached(trainer, module)
    assert_compiled_as_eager(module)


def ddp(cell: Cell, runs: Runs, folder: Path) -> None:
    """Two processes come to the same weights, moments, masks, ranges and scales, bit for bit."""
    found = runs.two_processes(cell)
    if found != "ok":
        raise RuntimeError(found.split("\n")[-1]) from Exception(found)


def alike(method: str, name: str, folder: Path) -> None:
    """Of the property ddp: what each of the two processes does."""
    cell = Cell(method, name, "ddp")
    module = cell.make_module()
    trainer = cell.make_trainer(folder, devices=2, strategy="ddp_find_unused_parameters_true")
    trainer.fit(module)
    mine = snapshot(trainer, module)
    mine["weights"] = {n: p.detach() for n, p in module.named_parameters()}
    mine["callbacks"].pop("CompressionReport", None)  # it measures in one process
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, mine)
    assert not differences(*both), "the processes differ"
    cell.assert_reached(trainer, module)


def export(cell: Cell, runs: Runs, folder: Path) -> None:
    """The file runs and agrees; what cannot be captured, or has no integer codes, ends its run with the reason."""
    if cell.is_plain:
        _, trained, _ = runs(cell)
        torch.export.export(trained.eval(), inputs_of(trained))
        return
    module, trainer = cell.make_module(), cell.make_trainer(folder, made := Export(["onnx"], rehearse=False))
    if cell.module in NOT_CAPTURED or cell.how.simulated:
        with pytest.warns(UserWarning, match="Export to onnx failed"):
            trainer.fit(module)
        assert "onnx" in made.failures
        assert cell.module in NOT_CAPTURED or "no form in integer kernels" in made.failures["onnx"]
        return
    trainer.fit(module)
    assert not made.failures
    assert_agrees(made.artifacts[0])
    cell.assert_reached(trainer, module)


PROPERTIES: dict[str, Callable[[Cell, Runs, Path], None]] = {
    "inert": inert,
    "target": target,
    "resume": resume,
    "test": test,
    "load": load,
    "copy": copies,
    "accumulate": accumulate,
    "bf16": bf16,
    "ema": ema,
    "compile": compiled,
    "ddp": ddp,
    "export": export,
}


def whole_matrix(full: bool) -> list[Cell]:
    """Every cell there is."""
    return [
        Cell(method, module, key, full)
        for module in MODULES
        for method, how in METHODS.items()
        if module in how.modules
        for key in PROPERTIES
    ]


# What a cell costs, in runs of the module. Cells share one run, so asking whether it reached its target is cheapest.
COST = {
    "target": 1,
    "inert": 2,
    "resume": 2,
    "test": 2,
    "load": 2,
    "copy": 2,
    "accumulate": 2,
    "bf16": 2,
    "ema": 4,
    "compile": 6,
    "ddp": 6,
    "export": 8,
}


def thinned(cells: list[Cell]) -> list[Cell]:
    """Few of the cells: every pair of a method, a module and a property is in one that runs.

    Every method also resumes from every checkpoint that it writes. The cells are chosen greedily: always the one that
    covers most of what is still lacking per cost, the first of several equals, so that the choice is always the same.
    """
    chosen: set[Cell] = set()
    lacking = {pair for cell in cells for pair in pairs(cell)}
    while lacking:
        best = max(cells, key=lambda cell: len(lacking.intersection(pairs(cell))) / COST[cell.property])
        lacking.difference_update(pairs(best))
        chosen.add(best)
    return [cell for cell in cells if cell in chosen]


def pairs(cell: Cell) -> list[tuple[str, ...]]:
    """What a cell has two by two; one that resumes also has the checkpoints that it resumes from."""
    found: list[tuple[str, ...]] = [
        (cell.method, cell.module),
        (cell.method, cell.property),
        (cell.module, cell.property),
    ]
    if cell.property == "resume":
        found += [(cell.method, "resume", str(batches)) for batches in cell.some(cell.how.saved)]
    return found
