"""Whatever else holds the weights: zeros are zeros where they are validated and saved, and a run resumes as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress import load_from_checkpoint
from lightning_compress.analysis.inspect import sparsity, weight_layers
from lightning_compress.callbacks import SET, ChannelPruning, GradualPruning, LayerPruning, RigL
from lightning_compress.callbacks.evaluate import copied, evaluate
from lightning_compress.callbacks.rollback import go_back, keep
from lightning_compress.phase import Phase
from lightning_compress.pruning import Taylor
from lightning_compress.structure.held import states_of
from lightning_compress.structure.mirrors import find_mirrors

from ..harness import SaveAfter
from .holders import MODULES, OPTIMIZERS, Averaged, Swaps
from .small import Small, fit

SWAPPING = [
    "schedulefree.AdamWScheduleFree",
    "schedulefree.SGDScheduleFree",
    "pytorch_optimizer.ScheduleFreeWrapper",
    "pytorch_optimizer.Lookahead",
    "pytorch_optimizer.SAM",
    "a Lookahead of a user's own",
]
PRUNING: dict[str, Callable[[], Any]] = {
    "GradualPruning": lambda: GradualPruning(0.8, phase=Phase(0.2, 0.5), every=2),
    "RigL": lambda: RigL(0.8, phase=Phase(0.2, 1.0), every=2),
}


class Validated(pl.Callback):
    """The weights with which each validation was run, and the step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen[trainer.global_step] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def make(kind: type[Small]) -> Small:
    torch.manual_seed(0)
    return kind()


def sparse(module: nn.Module) -> float:
    return sparsity([layer for layer in weight_layers(module) if not layer.name.startswith("average.")])


def of_weights(state: dict[str, Tensor]) -> float:
    """The share of zeros in the weights of linear layers, counted by hand."""
    weights = [value for name, value in state.items() if value.dim() == 2 and not name.startswith("average.")]
    return sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights)


@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("optimizer", SWAPPING)
def test_zeros_are_zero_where_they_are_validated_saved_and_kept_a_second_time(
    optimizer: str, pruning: str, tmp_path: Path
) -> None:
    kind = OPTIMIZERS[optimizer]
    module = make(kind)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = fit(tmp_path, module, PRUNING[pruning](), saved, seen := Validated())
    best = torch.load(saved.best_model_path, weights_only=False)
    # by its validation loss the best is the first that may be saved
    step = best["global_step"]
    # the module with pytorch_optimizer's takes the fast weights back before anything is saved
    for name, value in seen.seen[step].items() if optimizer != "pytorch_optimizer.Lookahead" else ():
        assert torch.equal(value, best["state_dict"][name]), name
    late = [of_weights(weights) for at, weights in seen.seen.items() if at >= step]
    assert len(late) >= 2
    assert min(late) >= 0.8 - 1e-3
    assert sparse(load_from_checkpoint(kind, saved.best_model_path)) >= 0.8 - 1e-3
    # whoever puts a second copy into the weights now puts zeros there
    zero = {id(layer.weight): layer.weight == 0 for layer in weight_layers(module)}
    copies = 0
    for _, p, state in states_of(trainer.optimizers[0]):
        values = [x for value in state.values() for x in (value if isinstance(value, list) else [value])]
        for value in values:
            if id(p) in zero and isinstance(value, Tensor) and value.shape == p.shape:
                copies += 1
                assert not value[zero[id(p)]].any()
    assert copies >= 8


@pytest.mark.parametrize("optimizer", ["pytorch_optimizer.Lookahead", "pytorch_optimizer.ScheduleFreeWrapper"])
def test_a_swap_after_the_run_keeps_zeros(optimizer: str, tmp_path: Path) -> None:
    module = make(OPTIMIZERS[optimizer])
    trainer = fit(tmp_path, module, PRUNING["GradualPruning"]())
    held = trainer.optimizers[0]
    swaps = [held.backup_and_load_cache] if "Lookahead" in optimizer else [held.train, held.eval]
    before = module.head.weight.clone()
    for swap in swaps:
        swap()
        assert sparse(module) >= 0.8 - 1e-3
        assert not torch.equal(before, module.head.weight)
        before = module.head.weight.clone()


def test_weights_that_a_callback_swaps_in_are_validated_with_zeros(tmp_path: Path) -> None:
    seen = Validated()
    fit(tmp_path, make(Small), PRUNING["GradualPruning"](), Swaps(), seen)
    assert of_weights(seen.seen[40]) >= 0.8 - 1e-3


@pytest.mark.parametrize("pruning", ["GradualPruning", "RigL", "ChannelPruning"])
@pytest.mark.parametrize(
    "optimizer",
    ["schedulefree.AdamWScheduleFree", "pytorch_optimizer.Lookahead", "pytorch_optimizer.SOAP", "torch.optim.Muon"],
)
def test_a_run_resumes_bit_identically(optimizer: str, pruning: str, tmp_path: Path) -> None:
    kinds = {**PRUNING, "ChannelPruning": lambda: ChannelPruning(0.4, phase=Phase(0.2, 0.4))}
    module = make(OPTIMIZERS[optimizer])
    fit(tmp_path, module, kinds[pruning](), saved=(10, 26))
    for batches in (10, 26):
        torch.manual_seed(1)
        resumed = OPTIMIZERS[optimizer]()
        fit(tmp_path, resumed, kinds[pruning](), ckpt_path=tmp_path / f"{batches}.ckpt")
        for name, value in module.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (batches, name)


@pytest.mark.parametrize(
    "shrinking", [ChannelPruning(0.4, phase=Phase(0.4, 0.5)), LayerPruning(1, max_share=1.0, phase=Phase(0.4, 0.5))]
)
@pytest.mark.parametrize("start", [0.2, 0.45, 0.8])
def test_a_stochastic_average_shrinks_with_the_model(shrinking: Any, start: float, tmp_path: Path) -> None:
    module = make(Small)
    averaging = StochasticWeightAveraging(1e-2, start)
    before = sum(p.numel() for p in module.parameters())
    fit(tmp_path, module, shrinking, averaging, saved=(26,))
    average = averaging._average_model
    shapes = {name: p.shape for name, p in module.named_parameters()}
    assert {name: p.shape for name, p in average.named_parameters()} == shapes
    assert sum(p.numel() for p in module.parameters()) < 0.8 * before
    for (name, p), theirs in zip(module.named_parameters(), average.parameters(), strict=True):
        assert torch.equal(p, theirs), name
    resumed = make(Small)
    again = [copy.deepcopy(shrinking), StochasticWeightAveraging(1e-2, start)]
    fit(tmp_path, resumed, *again, ckpt_path=tmp_path / "26.ckpt")
    assert {name: p.shape for name, p in resumed.named_parameters()} == shapes


def test_a_stochastic_average_of_pruned_weights_is_pruned_and_resumes(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [GradualPruning(0.8, phase=Phase(0.2, 0.7), every=2), StochasticWeightAveraging(1e-2, 0.4)]

    module = make(Small)
    fit(tmp_path, module, *callbacks(), saved=(24,))
    assert sparse(module) >= 0.8 - 1e-3
    resumed = make(Small)
    fit(tmp_path, resumed, *callbacks(), ckpt_path=tmp_path / "24.ckpt")
    assert sparse(resumed) >= 0.8 - 1e-3


def test_an_exchange_of_weights_reaches_averages(tmp_path: Path) -> None:
    seen = Validated()
    fit(tmp_path, make(Small), RigL(0.8, phase=Phase(0.2, 1.0), every=2), EMAWeightAveraging(decay=0.5), seen)
    assert min(of_weights(weights) for step, weights in seen.seen.items() if step >= 12) >= 0.8 - 1e-3


@pytest.mark.parametrize("kind", [GradualPruning, SET, ChannelPruning, LayerPruning])
def test_an_average_in_the_module_is_compressed_with_its_source(kind: Any, tmp_path: Path) -> None:
    amount = {"num_layers": 1, "max_share": 1.0} if kind is LayerPruning else {}
    module = make(Averaged)
    dense = sum(p.numel() for p in module.average.parameters())
    trainer = fit(tmp_path, module, kind(phase=Phase(0.2, 0.5), **amount))
    assert find_mirrors(module) == {"average.module": "blocks"}
    ours, theirs = dict(module.blocks.named_parameters()), dict(module.average.module.named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    if kind in (GradualPruning, SET):
        assert all(not theirs[name][p == 0].any() for name, p in ours.items() if p.dim() == 2)
    else:
        assert sum(p.numel() for p in theirs.values()) < 0.8 * dense
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = load_from_checkpoint(Averaged, tmp_path / "end.ckpt")
    assert all(torch.equal(p, theirs[name]) for name, p in loaded.average.module.named_parameters())


@pytest.mark.parametrize("kind", [GradualPruning, RigL, SET])
def test_an_embedding_with_sparse_gradients_is_pruned(kind: Any, tmp_path: Path) -> None:
    module = make(MODULES["SparseAdam"])
    callback = kind(0.5, Taylor(), phase=Phase(0.2, 0.8), include=["words"])
    callback.every = 4
    fit(tmp_path, module, callback)
    assert float((module.words.weight == 0).float().mean()) >= 0.5


class Returns(pl.Callback):
    """Keeps the state of a run, and goes back to it."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = self.values(trainer, pl_module)
        if trainer.global_step == 10:
            self.kept, self.before = keep(trainer, pl_module), copy.deepcopy(now)
        if trainer.global_step == 15:
            assert not self.same(now)
            go_back(trainer, pl_module, self.kept)
            assert self.same(self.values(trainer, pl_module))

    def values(self, trainer: Any, pl_module: Any) -> list[Tensor]:
        states = [state for o in trainer.optimizers for _, _, state in states_of(o)]
        return [x for x in tree_leaves([dict(pl_module.state_dict()), states]) if isinstance(x, Tensor)]

    def same(self, now: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(now, self.before, strict=True))


@pytest.mark.parametrize(
    "optimizer",
    ["pytorch_optimizer.Lookahead", "a Lookahead around SOAP", "pytorch_optimizer.SAM", "schedulefree.SGDScheduleFree"],
)
def test_a_run_goes_back_with_all_that_its_optimizer_holds(optimizer: str, tmp_path: Path) -> None:
    fit(tmp_path, make(OPTIMIZERS[optimizer]), returns := Returns(), PRUNING["GradualPruning"]())
    assert returns.before


class Norm(OPTIMIZERS["schedulefree.AdamWScheduleFree"]):  # type: ignore[misc]
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("norm", self.head.weight.norm())


class Measures(pl.Callback):
    """Measures a copy in the middle of training, and the weights themselves."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 10:
            before = pl_module.head.weight.norm().item()
            self.measured = evaluate(trainer, copied(pl_module))["norm"]
            assert pl_module.head.weight.norm().item() == before
            trainer.optimizers[0].eval()
            self.averaged, self.trained = pl_module.head.weight.norm().item(), before
            trainer.optimizers[0].train()


def test_a_copy_is_measured_with_the_weights_that_validation_asks_for(tmp_path: Path) -> None:
    fit(tmp_path, make(Norm), measures := Measures())
    assert measures.measured == pytest.approx(measures.averaged, rel=1e-6)
    assert measures.measured != pytest.approx(measures.trained, rel=1e-6)


class Unknown(Small):
    def __init__(self) -> None:
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(nn.ModuleList([self.stem, self.head]))


def test_an_average_of_something_unknown_is_refused_where_shapes_change(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"ChannelPruning: average is an AveragedModel .* set AveragedModel\(self.net\)"
    ):
        fit(tmp_path, make(Unknown), ChannelPruning(0.4))


@pytest.mark.parametrize("optimizer", ["pytorch_optimizer.TRAC", "an optimizer that keeps weights elsewhere"])
def test_optimizers_that_would_not_step_on_are_refused_by_name(optimizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ChannelPruning: (TRAC|Outside) keeps state that cannot shrink"):
        fit(tmp_path, make(OPTIMIZERS[optimizer]), ChannelPruning(0.4))


def test_rewinding_is_refused_for_an_optimizer_that_cannot_begin_anew(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GradualPruning.rewind=0.1: Lookahead keeps state that cannot be forgotten"):
        fit(tmp_path, make(OPTIMIZERS["pytorch_optimizer.Lookahead"]), GradualPruning(0.5, rewind=0.1))


def test_what_is_saved_between_validations_is_what_trains(tmp_path: Path) -> None:
    """Saving changes nothing: with and without a checkpoint a run is the same."""
    ends = []
    for saved in ((), (10, 22)):
        module = make(OPTIMIZERS["torch.optim.Muon"])
        fit(tmp_path, module, PRUNING["GradualPruning"](), SaveAfter(tmp_path, saved))
        ends.append(module.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
