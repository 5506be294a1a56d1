"""Every LightningModule of the zoo while it shrinks: channels and blocks removed inside fit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning_compress.callbacks import (
    ChannelPruning,
    Export,
    GradualPruning,
    LayerPruning,
    QuantizationAwareTraining,
)
from torch import nn

import lightning_compress
from lightning_compress.analysis.inspect import count_macs, sparsity
from lightning_compress.deploy.forward import Inputs
from lightning_compress.phase import Phase
from lightning_compress.pruning import MeanActivation, Taylor
from lightning_compress.quantization.prepare import prepared

from ..harness import (
    NOT_CAPTURED,
    NUM_BATCHES,
    PHASES,
    SPARSITY,
    SaveAfter,
    SeedEachBatch,
    accumulate_by_hand,
    assert_compiled_as_eager,
    assert_equal_outputs,
    callback_of,
    compile_inner,
    differences,
    in_two_processes,
    inputs_of,
    make_module,
    make_trainer,
    outputs,
    snapshot,
    where_plain_can,
)
from ..zoo import MODULES

METHODS: dict[str, Callable[[], Any]] = {
    "channels": lambda: ChannelPruning(0.5, phase=Phase(0.2, 0.5), steps=2),
    "layers": lambda: LayerPruning(1, phase=Phase(0.2, 0.5)),
}
NOTHING = {  # why no channel can go
    "lstm": {"net": "LSTM is left whole", "head": "an output layer"},
    "gru": {"net": "GRU is left whole", "head": "an output layer"},
    "boring": {"layer": "an output layer"},
    "manual-boring": {"layer": "an output layer"},
    "tied": {"embed": "share one weight and would lose different channels", "decoder": "an output layer"},
}
SHRINKS = [name for name in MODULES if name not in NOTHING]
BLOCKS = ["conv+bn+residual", "mlp", "attention", "transformer", "branch", "dict", "tied", "frozen", "foreign"]
SAVED = (2, 7, 8, 11, 12, 18)  # before, between and after the two shrinks, and after the only one


def each(names: Any) -> Any:
    return pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in names])


each_module, each_block = each(MODULES), each(BLOCKS)
each_other = each([name for name in MODULES if name not in BLOCKS])


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def train(method: str, name: str, folder: Path, extra: Any = (), **options: Any) -> Any:
    module = make_module(name)
    trainer = make_trainer(folder, callbacks=[SeedEachBatch(), METHODS[method](), *extra], **options)
    trainer.fit(module)
    return trainer, module


def assert_smaller(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    """Fewer parameters, in the model and in the optimizers, and it still runs; or all where nothing can go."""
    dense = make_module(name)
    dense.configure_model()
    whole = name in NOTHING and any(isinstance(c, ChannelPruning) for c in trainer.callbacks)
    left = sum(p.numel() for p in module.parameters()) / sum(p.numel() for p in dense.parameters())
    assert left == 1 if whole else left < 1
    mine = {id(p) for p in module.parameters()}
    for optimizer in trainer.optimizers:
        for p, state in optimizer.state.items():
            assert id(p) in mine
            assert all(v.shape == p.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    outputs(module)


@pytest.fixture(scope="session")
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole run a method and module, with its checkpoints, trained once and only read."""
    made: dict[tuple[str, str], Any] = {}

    def run(method: str, name: str) -> Any:
        if (method, name) not in made:
            folder = tmp_path_factory.mktemp(f"{method}-{name}".replace("+", "-"))
            made[method, name] = *train(method, name, folder, [SaveAfter(folder, (*SAVED, NUM_BATCHES))]), folder
        return made[method, name]

    return run


def inert(method: str, name: str, folder: Path) -> None:
    """Until the first shrink, the run is bit for bit the one without the callback."""
    plain, num_steps = make_module(name), 4 * (1 + hasattr(make_module(name), "generator"))
    make_trainer(folder, callbacks=[SeedEachBatch()], max_steps=num_steps).fit(plain)
    train(method, name, folder, [SaveAfter(folder, (4,))])
    saved = torch.load(folder / "4.ckpt", weights_only=True)
    assert not differences(saved["state_dict"], plain.state_dict())


def resume(method: str, name: str, shrunk: Any, folder: Path) -> None:
    """Resumed before, between and after the shrinks, a run ends bit-identically: weights, optimizers, callbacks."""
    expected = snapshot(*shrunk(method, name)[:2])
    for batches in SAVED:
        module, trainer = make_module(name), make_trainer(folder, callbacks=[SeedEachBatch(), METHODS[method]()])
        trainer.fit(module, ckpt_path=shrunk(method, name)[2] / f"{batches}.ckpt", weights_only=True)
        assert not differences(expected, snapshot(trainer, module)), f"resumed after {batches} batches"


def other_shapes(method: str, name: str, shrunk: Any, folder: Path) -> None:
    """One trainer tests checkpoints of other shapes, from dense to small and back, with one and the same module."""
    _, trained, checkpoints = shrunk(method, name)
    trainer, module = make_trainer(folder, callbacks=[METHODS[method]()]), make_module(name)
    found = {}
    for batches in (2, NUM_BATCHES, 2, 8, NUM_BATCHES):
        result = trainer.test(module, ckpt_path=checkpoints / f"{batches}.ckpt", verbose=False)
        saved = torch.load(checkpoints / f"{batches}.ckpt", weights_only=True)["state_dict"]
        assert not differences(saved, module.state_dict())
        assert found.setdefault(batches, result) == result
    assert found[NUM_BATCHES] == make_trainer(folder).test(copy.deepcopy(trained), verbose=False)


def load(method: str, name: str, shrunk: Any) -> None:
    _, trained, folder = shrunk(method, name)
    loaded = lightning_compress.load_from_checkpoint(MODULES[name], folder / f"{NUM_BATCHES}.ckpt")
    assert shapes(loaded) == shapes(trained)
    assert_equal_outputs(loaded, trained)
    again = MODULES[name].load_from_checkpoint(folder / "2.ckpt")
    assert (shapes(again) == shapes(trained)) == (method == "channels" and name in NOTHING)


def copies(method: str, name: str, shrunk: Any) -> None:
    _, trained, _ = shrunk(method, name)
    assert_equal_outputs(copy.deepcopy(trained), trained)
    if name != "foreign":  # torch itself pickles no parametrized module
        assert_equal_outputs(pickle.loads(pickle.dumps(trained)), trained)


def averaged(method: str, name: str, folder: Path) -> None:
    """Averaged weights shrink too; the run resumes bit-identically before and after."""

    def make(where: Path) -> pl.Trainer:
        callbacks = [SeedEachBatch(), EMAWeightAveraging(decay=0.8), METHODS[method]()]
        return make_trainer(where, callbacks=[*callbacks, SaveAfter(where, (8, 20))])

    module, trainer = make_module(name), make(folder)
    trainer.fit(module)
    assert_smaller(trainer, module, name)
    for batches in (8, 20):
        again, trainer_again = make_module(name), make(folder / "again")
        trainer_again.fit(again, ckpt_path=folder / f"{batches}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, module), snapshot(trainer_again, again))


def compiled(method: str, name: str, folder: Path) -> None:
    module = compile_inner(make_module(name))
    trainer = make_trainer(folder, callbacks=[SeedEachBatch(), METHODS[method]()])
    trainer.fit(module)
    assert_smaller(trainer, module, name)
    assert_compiled_as_eager(module)


@each_module
def test_channels_inert(name: str, tmp_path: Path) -> None:
    inert("channels", name, tmp_path)


@each_block
def test_layers_inert(name: str, tmp_path: Path) -> None:
    inert("layers", name, tmp_path)


@each_module
def test_channels_target(name: str, shrunk: Any) -> None:
    """Half of the channels are gone, and what was left alone is named with its reason."""
    trainer, module, _ = shrunk("channels", name)
    pruning = callback_of(trainer, ChannelPruning)
    assert pruning.shrinks == 2
    if name in NOTHING:
        assert shapes(module) == shapes(make_module(name))
        assert all(reason in pruning.skipped[layer] for layer, reason in NOTHING[name].items())
        return
    assert_smaller(trainer, module, name)
    widths, left = pruning._facts["widths"], pruning._facts["left"]
    assert sum(left.values()) <= 0.5 * sum(widths.values())
    assert all(left[key] >= 0.1 * widths[key] for key in widths)


@each_block
def test_layers_target(name: str, shrunk: Any) -> None:
    trainer, module, _ = shrunk("layers", name)
    assert_smaller(trainer, module, name)
    assert sum(isinstance(m, nn.Identity) and "Skip" in type(m).__name__ for m in module.modules()) == 1


@each_module
def test_channels_resume(name: str, shrunk: Any, tmp_path: Path) -> None:
    resume("channels", name, shrunk, tmp_path)


@each_block
def test_layers_resume(name: str, shrunk: Any, tmp_path: Path) -> None:
    resume("layers", name, shrunk, tmp_path)


@each_module
def test_channels_test(name: str, shrunk: Any, tmp_path: Path) -> None:
    other_shapes("channels", name, shrunk, tmp_path)


@each_block
def test_layers_test(name: str, shrunk: Any, tmp_path: Path) -> None:
    other_shapes("layers", name, shrunk, tmp_path)


@each_module
def test_channels_load(name: str, shrunk: Any) -> None:
    load("channels", name, shrunk)


@each_block
def test_layers_load(name: str, shrunk: Any) -> None:
    load("layers", name, shrunk)


@each_module
def test_channels_copy(name: str, shrunk: Any) -> None:
    copies("channels", name, shrunk)


@each_block
def test_layers_copy(name: str, shrunk: Any) -> None:
    copies("layers", name, shrunk)


@each_module
def test_channels_accumulate(name: str, tmp_path: Path) -> None:
    """Never inside a window of accumulated gradients."""
    module = make_module(name)
    by_hand = not module.automatic_optimization
    options = {} if by_hand else {"accumulate_grad_batches": 2}
    seen: list[int] = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(sum(p.numel() for p in pl_module.parameters()))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            assert by_hand or seen[-1] == sum(p.numel() for p in pl_module.parameters())

    callback = ChannelPruning(0.5, phase=Phase(5 / 24, 11 / 24), steps=2)
    trainer = make_trainer(tmp_path, callbacks=[SeedEachBatch(), callback, Watch()], **options)
    if by_hand:
        accumulate_by_hand(module, trainer)
    trainer.fit(module)
    assert_smaller(trainer, module, name)
    assert callback.shrinks == 2


@each_block
def test_layers_accumulate(name: str, tmp_path: Path) -> None:
    trainer, module = train("layers", name, tmp_path, accumulate_grad_batches=2)
    assert_smaller(trainer, module, name)


@each_block
def test_layers_bf16(name: str, tmp_path: Path) -> None:
    with where_plain_can(name, tmp_path, precision="bf16-mixed"):
        trainer, module = train("layers", name, tmp_path, precision="bf16-mixed")
    assert_smaller(trainer, module, name)
    assert all(torch.isfinite(p).all() for p in module.parameters())


@each_other
def test_layers_refused(name: str, tmp_path: Path) -> None:
    """A module without a block that gives back the shape it reads is refused before training, with what there is."""
    module = make_module(name)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"LayerPruning.num_layers=1: only 0 blocks"):
        make_trainer(tmp_path, callbacks=[METHODS["layers"]()]).fit(module)
    assert not differences(before, module.state_dict())


@each_module
def test_channels_bf16(name: str, tmp_path: Path) -> None:
    with where_plain_can(name, tmp_path, precision="bf16-mixed"):
        trainer, module = train("channels", name, tmp_path, precision="bf16-mixed")
    assert_smaller(trainer, module, name)
    assert all(torch.isfinite(p).all() for p in module.parameters())


@each_module
def test_channels_ema(name: str, tmp_path: Path) -> None:
    averaged("channels", name, tmp_path)


@each_block
def test_layers_ema(name: str, tmp_path: Path) -> None:
    averaged("layers", name, tmp_path)


@each_module
def test_channels_compile(name: str, tmp_path: Path) -> None:
    compiled("channels", name, tmp_path)


@each_block
def test_layers_compile(name: str, tmp_path: Path) -> None:
    compiled("layers", name, tmp_path)


@each_module
def test_channels_combined(name: str, tmp_path: Path) -> None:
    """Channels, then single weights, then integers, in one fit; the file runs, and the run resumes bit-identically."""

    def make(where: Path) -> pl.Trainer:
        callbacks = [
            SeedEachBatch(),
            ChannelPruning(0.5, phase=Phase(0.05, 0.2), steps=2),
            GradualPruning(SPARSITY, phase=PHASES["prune"], every=2),
            QuantizationAwareTraining(calibrate=PHASES["calibrate"], phase=PHASES["quantize"], freeze=0.6),
            SaveAfter(where, (3, 14)),
        ]
        return make_trainer(where, callbacks=callbacks)

    module, trainer = make_module(name), make(tmp_path)
    trainer.callbacks.append(export := Export(["onnx"], rehearse=False))
    if name in NOT_CAPTURED:
        with pytest.warns(UserWarning, match="Export to onnx failed"):
            trainer.fit(module)
    else:
        trainer.fit(module)
        assert not export.failures
        assert export.artifacts[0].agreement >= 0.99
    trainer.callbacks.remove(export)
    assert_smaller(trainer, module, name)
    assert sparsity(callback_of(trainer, GradualPruning).masks.layers) >= SPARSITY
    assert prepared(module).enabled
    for batches in (3, 14):
        again, trainer_again = make_module(name), make(tmp_path / "again")
        trainer_again.fit(again, ckpt_path=tmp_path / f"{batches}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, module), snapshot(trainer_again, again)), batches


@each_block
def test_layers_combined(name: str, tmp_path: Path) -> None:
    """Blocks that go while masks and averages live; then integers, and the file runs."""
    callbacks = [
        SeedEachBatch(),
        EMAWeightAveraging(decay=0.8),
        GradualPruning(SPARSITY, phase=Phase(0.1, 0.3), every=2),
        LayerPruning(1, phase=Phase(0.3, 0.5)),
        QuantizationAwareTraining(calibrate=PHASES["calibrate"], phase=PHASES["quantize"], freeze=0.6),
    ]
    export = Export(["onnx"], rehearse=False)
    module, trainer = make_module(name), make_trainer(tmp_path, [export], callbacks=None)
    trainer.callbacks[:0] = callbacks
    trainer.callbacks.append(export)
    if name in NOT_CAPTURED:
        with pytest.warns(UserWarning, match="Export to onnx failed"):
            trainer.fit(module)
    else:
        trainer.fit(module)
        assert not export.failures
        assert export.artifacts[0].agreement >= 0.99
    assert_smaller(trainer, module, name)
    layers = callback_of(trainer, GradualPruning).masks.layers
    names = {id(p) for p in module.parameters()}
    assert all(id(layer.weight) in names for layer in layers)


@pytest.fixture(scope="session")
def ddp_structured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All modules, one after the other, in one group of two processes."""
    return in_two_processes("ddp_structured", tmp_path_factory.mktemp("ddp"))


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("name", list(MODULES))
def test_channels_ddp(name: str, ddp_structured: dict[str, Any]) -> None:
    assert ddp_structured[f"channels {name}"] == "ok"


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("name", BLOCKS)
def test_layers_ddp(name: str, ddp_structured: dict[str, Any]) -> None:
    assert ddp_structured[f"layers {name}"] == "ok"


@pytest.mark.parametrize("target", ["parameters", "macs", "latency"])
def test_what_the_share_is_of(target: str, tmp_path: Path) -> None:
    module, dense = make_module("conv+bn+residual"), make_module("conv+bn+residual")
    pruning = ChannelPruning(0.6, target=target, steps=2, phase=Phase(0.2, 0.5), floor=0.0)
    make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    counts = []
    for each in (module, dense):
        each.eval()
        macs = count_macs(each, Inputs(inputs_of(each), {}))[""]
        counts.append({"parameters": sum(p.numel() for p in each.parameters()), "macs": macs})
    if target != "latency":
        assert 0.2 < counts[0][target] / counts[1][target] <= 0.4
    assert pruning.shrinks == 2


@pytest.mark.parametrize("criterion", [Taylor(), MeanActivation()])
def test_criteria_that_look_at_data(criterion: Any, tmp_path: Path) -> None:
    def make() -> pl.Trainer:
        pruning = ChannelPruning(0.5, criterion, phase=Phase(0.1, 0.5), steps=2, scope="local", round_to=2)
        return make_trainer(tmp_path, callbacks=[SeedEachBatch(), pruning, SaveAfter(tmp_path, (5, 9))])

    module, trainer = make_module("mlp"), make()
    trainer.fit(module)
    assert module.net[0].weight.shape == (16, 16)
    assert module.net[3].weight.shape == (16, 16)
    for batches in (5, 9):
        again, trainer_again = make_module("mlp"), make()
        trainer_again.fit(again, ckpt_path=tmp_path / f"{batches}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, module), snapshot(trainer_again, again))


def test_each_layer_can_have_a_share_of_its_own(tmp_path: Path) -> None:
    module = make_module("mlp")
    pruning = ChannelPruning(0.25, phase=Phase(0.2, 0.5), steps=2, scope="local", targets={"net.0": 0.75})
    make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    assert [module.net[i].out_features for i in (0, 3, 5)] == [8, 24, 4]
    assert (module.net[3].in_features, module.net[5].in_features) == (8, 24)


def test_a_share_of_a_layer_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    module = make_module("mlp")
    pruning = ChannelPruning(0.5, scope="local", targets={"tail": 0.5})
    with pytest.raises(ValueError, match=r"targets\['tail'\] matches no layer.*net.3, net.0"):
        make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    assert module.trainer.global_step == 0


def test_a_phase_that_ends_with_the_run_reaches_its_target(tmp_path: Path) -> None:
    pruning = ChannelPruning(0.5, phase=Phase(0.5, 1.0), steps=3)
    module = make_module("mlp")
    make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    assert pruning.shrinks == 3
    assert sum(pruning._facts["left"].values()) == 32


def test_the_best_checkpoint_is_a_small_one(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    _, module = train("channels", "mlp", tmp_path, [best], enable_checkpointing=True)
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert {name: tuple(value.shape) for name, value in saved.items()} == shapes(module)
    assert "check_monitor_top_k" not in best.__dict__


def test_a_second_fit_keeps_what_was_removed(tmp_path: Path) -> None:
    module, trainer = make_module("mlp"), make_trainer(tmp_path, callbacks=[METHODS["channels"]()])
    trainer.fit(module)
    before = shapes(module)
    trainer.fit_loop.max_epochs += 2
    trainer.fit(module)
    assert shapes(module) == before


@pytest.mark.parametrize("kind", ["lbfgs", "adafactor"])
def test_optimizers_that_cannot_follow_are_refused(kind: str, tmp_path: Path) -> None:
    module = make_module("mlp")
    optimizer = torch.optim.LBFGS if kind == "lbfgs" else torch.optim.Adafactor
    module.configure_optimizers = lambda: optimizer(module.parameters())
    with pytest.raises(ValueError, match="keeps state that cannot shrink with its parameters"):
        make_trainer(tmp_path, callbacks=[ChannelPruning()]).fit(module)


def test_an_example_input_array_stands_in_for_validation_data(tmp_path: Path) -> None:
    module = make_module("mlp")
    module.example_input_array = module.tensors()[0]
    module.val_dataloader = None
    pruning = ChannelPruning(0.5, phase=Phase(0.2, 0.5))
    make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    assert pruning.shrinks == 1
    bare = make_module("mlp")
    bare.val_dataloader = None
    with pytest.raises(ValueError, match=r"set self[.]example_input_array"):
        make_trainer(tmp_path, callbacks=[ChannelPruning()]).fit(bare)


def test_more_blocks_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only 1 blocks can be removed together.*net\.3"):
        make_trainer(tmp_path, callbacks=[LayerPruning(2)]).fit(make_module("mlp"))
    with pytest.raises(ValueError, match="are: none"):
        make_trainer(tmp_path, callbacks=[LayerPruning()]).fit(make_module("lstm"))


def test_a_checkpoint_of_another_model_is_still_refused(shrunk: Any, tmp_path: Path) -> None:
    folder = shrunk("channels", "mlp")[2]
    wide = make_module("mlp")
    wide.net[0], wide.net[3] = nn.Linear(16, 48), nn.Linear(48, 32)
    for batches in (2, NUM_BATCHES):
        with pytest.raises(ValueError, match="of another structure"):
            make_trainer(tmp_path, callbacks=[METHODS["channels"]()]).test(wide, ckpt_path=folder / f"{batches}.ckpt")


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sparsity": (lambda: ChannelPruning(1.0), ValueError, "sparsity=1.0: accepted is a share in 0..1"),
    "steps": (lambda: ChannelPruning(steps=0), ValueError, "steps=0: accepted is a whole number"),
    "targets": (lambda: ChannelPruning(scope="local", targets={"a": 1.0}), ValueError, "accepted is a share in 0..1"),
    "targets of all": (lambda: ChannelPruning(targets={"a": 0.5}), ValueError, "Accepted are target='channels' and"),
    "target": (lambda: ChannelPruning(target="flops"), ValueError, "target='flops': accepted are 'channels'"),
    "scope": (lambda: ChannelPruning(scope="layer"), ValueError, "scope='layer': accepted are 'global'"),
    "criterion": (lambda: ChannelPruning(criterion="l1"), TypeError, "criterion='l1': accepted is a Criterion"),
    "num_layers": (lambda: LayerPruning(0), ValueError, "num_layers=0: accepted is a whole number"),
}


@pytest.mark.parametrize("given", list(REFUSED))
def test_refused(given: str) -> None:
    call, kind, message = REFUSED[given]
    with pytest.raises(kind, match=message):
        call()


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    for callback in (ChannelPruning(include=["x.*"]), ChannelPruning(num_heads={"x": 2}), LayerPruning(exclude=["x"])):
        with pytest.raises(ValueError, match="matches no"):
            make_trainer(tmp_path, callbacks=[callback]).fit(make_module("mlp"))
