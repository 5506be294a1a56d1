"""Modules without what callbacks lean on: validation, a forward that is called, hooks that run without the Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.analysis.inspect import sparsity, weight_layers
from lightning_compress.analysis.report import summary_rows
from lightning_compress.callbacks import (
    SET,
    AccuracyGuard,
    ChannelPruning,
    CompressionReport,
    Export,
    FineTuning,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.deploy.formats import FORMATS, Format
from lightning_compress.deploy.runner import Kernels
from lightning_compress.forward import Inputs, run_model
from lightning_compress.phase import Phase
from lightning_compress.quantization.model import quantization_of

from ..zoo import noise

SOME = Phase(0.25, 0.5)


def net() -> nn.Sequential:
    first = [nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


class NoValidation(pl.LightningModule):
    """Trains by its forward, and is never validated."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


class CallsItsNet(pl.LightningModule):
    """Has no forward: both of its steps call the net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


class TwoNets(pl.LightningModule):
    """A GAN without forward and validation: two networks, two optimizers, manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        hidden = [nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU()]
        self.generator = nn.Sequential(*hidden, nn.Linear(24, 16))
        self.discriminator = nn.Sequential(nn.Linear(16, 24), nn.LeakyReLU(0.2), nn.Linear(24, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 8))
        self._step(generator, self._loss(fake, 1.0))
        self._step(discriminator, self._loss(batch[0], 1.0) + self._loss(fake.detach(), 0.0))

    def _loss(self, x: Tensor, target: float) -> Tensor:
        answer = self.discriminator(x)
        return F.binary_cross_entropy_with_logits(answer, torch.full_like(answer, target))

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.generator, self.discriminator)]


class Asking(NoValidation):
    """Hooks of its validation ask for the logger, the optimizer and the scheduler, and change what they get."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def on_validation_start(self) -> None:
        self.logger.log_metrics({"validations": 1.0}, step=self.global_step)

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.optimizers().param_groups[0]["lr"] *= 0.5

    def on_validation_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 1.0)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1)]


MODULES: dict[str, type[pl.LightningModule]] = {
    "no validation_step": NoValidation,
    "steps call self.net": CallsItsNet,
    "GAN, manual": TwoNets,
    "hooks ask": Asking,
}


def loader(generator: torch.Generator | None = None) -> DataLoader[Any]:
    data = TensorDataset(noise(32, 16), torch.arange(32) % 4)
    return DataLoader(data, 8, shuffle=generator is not None, generator=generator)


def fit(folder: Path, module: pl.LightningModule, *callbacks: Any, data: Any = None, **options: Any) -> pl.Trainer:
    """Train for 8 steps."""
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(folder) if isinstance(module, Asking) else False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    trainer = pl.Trainer(**{**settings, **options})
    trainer.fit(module, *(data or (loader(), loader())))
    return trainer


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def is_sparse(module: pl.LightningModule, dense: int, *callbacks: Any) -> bool:
    return 0.78 < sparsity(weight_layers(module)) < 0.82


def is_smaller(module: pl.LightningModule, dense: int, callback: Any) -> bool:
    return num_parameters(module) < 0.7 * dense and callback.reached


def is_quantized(module: pl.LightningModule, dense: int, callback: Any) -> bool:
    quantization = quantization_of(module)
    return quantization is not None and quantization.enabled and quantization.placement is not None


def is_taught(module: pl.LightningModule, dense: int, callback: Any) -> bool:
    return callback.stands()["taught steps"] > 0


def is_reported(module: pl.LightningModule, dense: int, callback: Any) -> bool:
    """What is not measured is None, and said."""
    report = callback.report
    said = " ".join(report["warnings"])
    metric = report["compressed"]["metric"]
    measured = report["compressed"]["macs"] is None
    return (metric is None) == ("self.log('val_loss', loss)" in said) and measured == ("self(...)" in said)


CALLBACKS: dict[str, tuple[Callable[[], list[Any]], Callable[..., bool]]] = {
    "GradualPruning": (lambda: [GradualPruning(0.8, phase=SOME)], is_sparse),
    "RigL": (lambda: [RigL(0.8)], is_sparse),
    "SET": (lambda: [SET(0.8)], is_sparse),
    "FineTuning": (lambda: [GradualPruning(0.8, phase=SOME), FineTuning(Phase(0.5, 0.75), "rewind")], is_sparse),
    "ChannelPruning": (lambda: [ChannelPruning(0.5, phase=SOME)], is_smaller),
    "LayerPruning": (lambda: [LayerPruning(1, max_share=1.0, phase=SOME)], is_smaller),
    "QuantizationAwareTraining": (
        lambda: [QuantizationAwareTraining(calibrate=SOME, phase=Phase(0.5, 1.0))],
        is_quantized,
    ),
    "PostTrainingQuantization": (lambda: [PostTrainingQuantization(calibrate=Phase(0.5, 1.0))], is_quantized),
    "KnowledgeDistillation": (lambda: [KnowledgeDistillation(phase=Phase(0.25, 1.0))], is_taught),
    "CompressionReport": (lambda: [CompressionReport(show=False)], is_reported),
}
REFUSED = {
    ("GAN, manual", "KnowledgeDistillation"): r"KnowledgeDistillation\(by_hand=True\)",
    ("no validation_step", "AccuracyGuard"): r"has no validation_step\. Define one that logs: self\.log\(",
    ("GAN, manual", "AccuracyGuard"): r"has no validation_step\. Define one that logs: self\.log\(",
    ("steps call self.net", "Export"): r"calls CallsItsNet\.forward\. Define forward, and call self\(\.\.\.\)",
    ("GAN, manual", "Export"): r"calls TwoNets\.forward\. Define forward, and call self\(\.\.\.\)",
}
MORE: dict[str, Callable[[], list[Any]]] = {
    "AccuracyGuard": lambda: [AccuracyGuard()],
    "Export": lambda: [Export()],
}


ACTS = [(name, callback) for callback in CALLBACKS for name in MODULES if (name, callback) not in REFUSED]


@pytest.mark.parametrize(("name", "callback"), ACTS)
def test_each_callback_acts(name: str, callback: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    make, has_acted = CALLBACKS[callback]
    callbacks = make()
    dense = num_parameters(module)
    fit(tmp_path, module, *callbacks)
    assert has_acted(module, dense, *callbacks)


@pytest.mark.parametrize(("name", "callback"), list(REFUSED))
def test_or_is_refused_before_training_with_the_line_that_helps(name: str, callback: str, tmp_path: Path) -> None:
    make = MORE[callback] if callback in MORE else CALLBACKS[callback][0]
    before = NoSteps()
    with pytest.raises(ValueError, match=REFUSED[name, callback]):
        fit(tmp_path, MODULES[name](), *make(), before)


class NoSteps(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("training has begun")


class Functional(pl.LightningModule):
    """Calls no module at all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(F.linear(batch[0], self.fc.weight), batch[1])

    configure_optimizers = NoValidation.configure_optimizers


class KnowsItself(CallsItsNet):
    """A training step that cannot run on a copy of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = id(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.mine == id(self), "I am a copy"
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def with_array(module: pl.LightningModule) -> pl.LightningModule:
    module.example_input_array = torch.zeros(8, 16)
    return module


@pytest.mark.parametrize(
    ("make", "callback", "message"),
    [
        (Functional, ChannelPruning(), r"ChannelPruning needs an example .* Define forward, and call self"),
        (Functional, LayerPruning(), r"LayerPruning needs an example .* Define forward, and call self"),
        (Functional, KnowledgeDistillation(phase=Phase(0.5, 1.0)), "no module with parameters. Name the module"),
        (KnowsItself, ChannelPruning(), r"on a copy of the model, training_step raised AssertionError: I am a copy"),
        (lambda: with_array(Functional()), ChannelPruning(), "Define forward, and call self"),
    ],
)
def test_what_no_step_shows_is_refused(make: Any, callback: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make(), callback, NoSteps())


def test_an_example_input_array_comes_before_a_training_step(tmp_path: Path) -> None:
    class OfTwo(KnowsItself):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    fit(tmp_path, module := with_array(OfTwo()), ChannelPruning(0.5, phase=SOME))
    assert num_parameters(module) < 1200


def test_both_nets_of_a_gan_shrink_and_what_leaves_them_keeps_its_shape(tmp_path: Path) -> None:
    fit(tmp_path, module := TwoNets(), channels := ChannelPruning(0.5, phase=SOME))
    shapes = {name: p.shape for name, p in module.named_parameters() if name.endswith("weight")}
    assert shapes["generator.5.weight"][0] == 16
    assert shapes["discriminator.0.weight"][1] == 16
    assert shapes["generator.0.weight"][0] < 24
    assert shapes["discriminator.0.weight"][0] < 24
    assert set(channels.skipped.values()) == {"an output layer"}


def test_the_report_shows_what_is_not_measured(tmp_path: Path) -> None:
    pruning = GradualPruning(0.5, phase=SOME)
    with pytest.warns(UserWarning, match="CompressionReport measures no metric: NoValidation has no validation_step"):
        fit(tmp_path, NoValidation(), pruning, CompressionReport(show=False))
    (path,) = tmp_path.rglob("report.json")
    report = json.loads(path.read_text())
    assert report["metric"] is None
    for key in ("dense", "compressed"):
        assert report[key]["metric"] is None
        assert report[key]["macs"] == 16 * 32 + 32 * 32 + 32 * 4
        assert report[key]["bytes"] > 0
    assert [row[1] for row in summary_rows(report)] == ["-", "-"]
    assert len([text for text in report["warnings"] if "metric is not measured" in text]) == 1


@pytest.mark.parametrize(
    ("options", "data", "line"),
    [
        ({}, (loader(),), "there is no val_dataloader. Give one: trainer.fit"),
        ({"limit_val_batches": 0}, None, "limit_val_batches=0. Leave it out of the Trainer"),
    ],
)
def test_a_run_without_validation_data_is_reported_too(options: Any, data: Any, line: str, tmp_path: Path) -> None:
    fit(tmp_path, CallsItsNet(), report := CompressionReport(show=False), data=data, **options)
    assert report.report is not None
    assert line in report.report["warnings"][0]


def export(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Writes a file for :class:`Runner`."""
    path.parent.mkdir(exist_ok=True)
    torch.save(model, path)


class Runner:
    """Runs such a file, off by .001."""

    runtime = "the test's"

    def __init__(self, path: Path, outputs: object) -> None:
        self.model = torch.load(path, weights_only=False)

    def __call__(self, inputs: Inputs) -> Tensor:
        return run_model(self.model, inputs) + 0.001

    def prepare(self, inputs: Inputs) -> Callable[[], Tensor]:
        return lambda: self(inputs)

    def integer_kernels(self) -> Kernels:
        return Kernels(0, 0)


def test_a_file_is_compared_on_the_inputs_of_a_training_step(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(FORMATS, "torch", Format(".pt", "", (), __name__))
    fit(tmp_path, NoValidation(), exported := Export(["torch"]))
    (artifact,) = exported.artifacts
    assert artifact.agreement == 1.0
    assert artifact.max_abs_diff == pytest.approx(0.001, rel=1e-2)
    assert exported.metrics == {"torch": {}}


@pytest.mark.parametrize("name", ["no validation_step", "GAN, manual"])
def test_a_run_is_bitwise_the_same_where_its_steps_were_watched(name: str, tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [CompressionReport(show=False), LayerPruning(1, max_share=1.0, phase=Phase(1.0, 1.0))]):
        torch.manual_seed(0)
        module = MODULES[name]()
        data = (loader(torch.Generator().manual_seed(1)),)
        fit(tmp_path, module, *callbacks, data=data, max_steps=6)
        weights.append({key: value.clone() for key, value in module.state_dict().items()})
    assert weights[0].keys() >= weights[1].keys()
    assert all(torch.equal(value, weights[0][key]) for key, value in weights[1].items())


def test_hooks_change_nothing_of_the_run_when_a_copy_is_validated(tmp_path: Path) -> None:
    rates = []
    for callbacks in ([], [CompressionReport(show=False), ChannelPruning(0.5, phase=SOME)]):
        trainer = fit(tmp_path, Asking(), *callbacks)
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        rates.append((scheduler.last_epoch, trainer.optimizers[0].param_groups[0]["lr"]))
    assert rates[0] == rates[1]


class Doubled(pl.LightningDataModule):
    """Its hooks are a part of the data."""

    num_setups = 0

    def setup(self, stage: str) -> None:
        self.num_setups += 1

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 0 + 2, batch[1]


class SeesTwos(NoValidation):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).sum() * 0 + batch[0].mean() + self.trainer.datamodule.num_setups)


def test_a_copy_is_validated_by_the_hooks_of_a_datamodule_that_is_set_up_once(tmp_path: Path) -> None:
    data = Doubled()
    fit(tmp_path, SeesTwos(), report := CompressionReport(show=False), data=(data,))
    assert report.report is not None
    assert report.report["compressed"]["metric"] == 3.0
    assert data.num_setups == 1


class Graph(NoValidation):
    """Nodes and edges: the first axis of the inputs is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.Identity()  # a batch norm that no step runs could be anybody's

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.net[0], self.net[3]):
            y = layer(x)
            x = F.relu(y.index_add(0, edges[1], y[edges[0]]))
        return self.net[5](x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(*batch[:2]), batch[2])


class Lists(NoValidation):
    """A list of tensors of several lengths."""

    def forward(self, xs: Any) -> Tensor:
        return torch.stack([self.net(x).mean(0) for x in xs])


class Words(NoValidation):
    """Sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 16, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.words(x.argmax(-1)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Kept(NoValidation):
    """Keeps its losses with their graphs, and its first layer's weight is computed by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.net.insert(0, nn.utils.weight_norm(nn.Linear(16, 16)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss)
        return loss


GRAPH = DataLoader([(noise(20, 16), torch.arange(40).view(2, 20) % 20, torch.arange(20) % 4)] * 4, None)
LISTS = DataLoader([([noise(n, 16) for n in (3, 5, 7)], torch.arange(3))] * 4, None)
SITUATIONS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "graphs": (Graph, GRAPH, {}),
    "lists": (Lists, LISTS, {}),
    "sparse gradients": (Words, loader(), {}),
    "losses are kept": (Kept, loader(), {}),
    "bf16-true": (NoValidation, loader(), {"precision": "bf16-true"}),
    "64-true": (NoValidation, loader(), {"precision": "64-true"}),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("situation", list(SITUATIONS))
def test_other_inputs_and_tensors_shrink_too(situation: str, tmp_path: Path) -> None:
    make, data, options = SITUATIONS[situation]
    module = make()
    dense = num_parameters(module)
    report = CompressionReport(show=False)
    fit(tmp_path, module, ChannelPruning(0.5, phase=SOME), report, data=(data,), **options)
    assert num_parameters(module) < 0.7 * dense
    assert report.report is not None
    assert report.report["compressed"]["macs"] < report.report["dense"]["macs"]
