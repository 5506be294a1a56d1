from __future__ import annotations

import copy
import io
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from lightning_compress.callbacks import ChannelPruning, CompressionReport
from lightning_compress.copies import copy_module
from lightning_compress.phase import Phase

from ..harness import make_trainer


class Cache:
    """An object that is no container, with values of a graph and what nobody can copy."""

    def __init__(self, x: Tensor) -> None:
        self.values = {"last": [x]}
        self.lock = threading.Lock()


class Refusing:
    def __deepcopy__(self, memo: dict[int, Any]) -> Refusing:
        raise RuntimeError("one of these is enough")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


SHARED: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "condition": threading.Condition,
    "file": lambda: io.TextIOWrapper(io.BytesIO()),
    "generator": lambda: (i for i in range(3)),
    "pool": lambda: ThreadPoolExecutor(1),
    "queue": queue.Queue,
    "thread": lambda: threading.Thread(target=print),
    "local": threading.local,
    "module": lambda: threading,
}


@pytest.mark.parametrize("kind", list(SHARED))
@pytest.mark.parametrize("where", ["attribute", "list", "inside"])
def test_what_nobody_can_copy_is_shared(kind: str, where: str) -> None:
    model, held = net(), SHARED[kind]()
    holder: Any = {"attribute": held, "list": {"all": [held]}, "inside": Cache(torch.ones(1))}[where]
    if where == "inside":
        holder.held = held
    model[0].holder = holder
    own = copy_module(model)
    found = {"attribute": lambda x: x, "list": lambda x: x["all"][0], "inside": lambda x: x.held}[where](own[0].holder)
    assert found is held
    assert where == "attribute" or own[0].holder is not holder
    assert own[0].weight is not model[0].weight
    assert torch.equal(own[0].weight, model[0].weight)


@pytest.mark.parametrize("hidden", [False, True], ids=["in a list", "in an object"])
def test_values_with_a_graph_are_copied_without_it(hidden: bool) -> None:
    model = net()
    loss = model(torch.ones(1, 3)).sum()
    model.kept = Cache(loss) if hidden else {"losses": [loss, loss]}
    own = copy_module(model)
    found = own.kept.values["last"][0] if hidden else own.kept["losses"][0]
    assert found.grad_fn is None
    assert found == loss
    assert found is not loss
    assert loss.grad_fn is not None  # the original keeps its graph
    if not hidden:
        assert own.kept["losses"][0] is own.kept["losses"][1]


def test_metrics_with_a_graph_go_on_counting_apart() -> None:
    model = net()
    output = model(torch.ones(2, 3))
    model.metric = MeanSquaredError()
    model.metric(output, torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    own = copy_module(model)
    assert own.metric.compute() == model.metric.compute()
    own.metric.update(torch.ones(2, 2), torch.zeros(2, 2))
    assert own.metric.compute() != model.metric.compute()
    assert own.metric._forward_cache.grad_fn is None


def test_weak_references_are_to_the_copy() -> None:
    model, outside = net(), net()
    model.ref, model.refs = weakref.ref(model[0]), {"last": [weakref.ref(model[2].weight)]}
    model.outside = weakref.ref(outside)
    own = copy_module(model)
    assert own.ref() is own[0]
    assert own.refs["last"][0]() is own[2].weight
    assert own.outside() is outside


def test_hooks_see_the_copy() -> None:
    model = net()
    seen: list[Tensor] = []

    def attach(module: nn.Module) -> None:
        module[0].register_forward_hook(lambda *_: seen.append(module[0].weight))

    attach(model)
    own = copy_module(model)
    own(torch.ones(1, 3))
    assert not seen
    with torch.no_grad():
        model(torch.ones(1, 3))
    assert seen[0] is model[0].weight


def test_what_refuses_is_named() -> None:
    model = net()
    model[2].sensor = {"all": Refusing()}
    with pytest.raises(
        TypeError, match=r"Sequential\.2\.sensor cannot be copied.*RuntimeError: one of these is enough"
    ):
        copy_module(model)


class Counting(pl.LightningModule):
    """Its metric is updated with what has a graph, and it holds a lock, a pool and a cache."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.net = net()
        self.metric = MeanSquaredError()
        self.lock, self.pool, self.held = threading.Lock(), ThreadPoolExecutor(1), held

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.cache = Cache(self.net(x))
        return self.cache.values["last"][0]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        output = self(batch[0])
        self.metric.update(output, torch.zeros_like(output))
        return output.square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 3)), 4)


def test_a_model_that_holds_them_shrinks_and_is_measured(tmp_path: Any) -> None:
    module, report = Counting(), CompressionReport(dirpath=tmp_path / "report", show=False)
    shrinking = ChannelPruning(0.5, phase=Phase(0.4, 0.6))
    make_trainer(tmp_path, max_epochs=2, callbacks=[shrinking, report]).fit(module, loader(), loader())
    assert module.net[0].out_features == 2
    assert report.report is not None
    assert report.report["dense"]["macs"] == 3 * 4 + 4 * 2
    assert report.report["dense"]["metric"] is not None


def test_one_that_cannot_be_copied_is_refused_before_training(tmp_path: Any) -> None:
    module = Counting(Refusing())
    trainer = make_trainer(tmp_path, callbacks=[ChannelPruning(0.5)])
    with pytest.raises(TypeError, match=r"Counting\.held cannot be copied"):
        trainer.fit(module, loader(), loader())
    assert not trainer.global_step
