"""Modules of which one batch of validation does not show everything, and modules whose batches have no first axis."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

NUM_BATCHES = 4


def pairs(width: int = 16, seed: int = 0) -> DataLoader[Any]:
    """Four batches of eight samples of four classes."""
    x = torch.randn(32, width, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, torch.arange(32) % 4), batch_size=8)


def items(make: Callable[[], Any]) -> DataLoader[Any]:
    """Four batches that are what a call makes."""
    return DataLoader([make() for _ in range(NUM_BATCHES)], batch_size=None)


def trunk(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU())


class Branching(pl.LightningModule):
    """A trunk and a head; what a subclass adds is a way that plain validation does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.trunk(x))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)

    def train_dataloader(self) -> Any:
        return pairs()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class DeepSupervision(Branching):
    """A second head while training, inside of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        inner = self.trunk[:2](x)
        out = self.head(self.trunk[2:](inner))
        return (out, self.aux(inner)) if self.training else out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(out, batch[1]) for out in self(batch[0]))  # type: ignore[return-value]


class AuxiliaryStep(Branching):
    """A second head that the training step calls by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(24, 7)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = self.trunk(batch[0])
        return F.cross_entropy(self.head(h), batch[1]) + self.aux(h).pow(2).mean()


class TestHead(Branching):
    """A head of test_step alone."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(24, 3)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_mean", self.other(self.trunk(batch[0])).mean())


class PredictHead(Branching):
    """A head of predict_step alone, behind a look at forward's own features."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 2))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.other(F.normalize(self.trunk(batch[0])))


class TestData(Branching):
    """A head of test_step alone, which takes other data than training and validation have."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(24, 3)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_mean", self.other(self.trunk(batch["image"])).mean())

    def test_dataloader(self) -> Any:
        return items(lambda: {"image": torch.randn(8, 16)})


class Tasks(Branching):
    """One head a task, and the task of the batch is that of its number."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(24, 4), "b": nn.Linear(24, 4)})
        self.head = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor, *, task: str = "a") -> Tensor:
        return self.heads[task](self.trunk(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0], task="ab"[batch_idx % 2]), batch[1])


class ByLoader(Branching):
    """One stem for each of two dataloaders of validation and test, whose samples have other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList([nn.Linear(16, 20), nn.Linear(9, 20)])
        self.trunk = trunk(20)

    def forward(self, x: Tensor, which: int = 0) -> Tensor:
        return self.head(self.trunk(self.stems[which](x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0][0], 0), batch[0][1]) + F.cross_entropy(self(batch[1][0], 1), batch[1][1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0], dataloader_idx), batch[1]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0], dataloader_idx), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0], dataloader_idx)

    def train_dataloader(self) -> Any:
        return [pairs(), pairs(9)]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class MultiTask(Branching):
    """One batch holds the batches of two tasks, of which validation has one."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Linear(24, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["classes"]
        return F.cross_entropy(self(x), y) + self.depth(self.trunk(batch["depth"][0])).pow(2).mean()

    def train_dataloader(self) -> Any:
        return CombinedLoader({"classes": pairs(), "depth": pairs(seed=1)}, "min_size")


class Chance(Branching):
    """Layers that are skipped at random while training, without a residual: what is before meets what is behind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(24, 24) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        for block in self.blocks:
            if not self.training or random.random() < 0.7:
                x = block(x).relu()
        return self.head(x)


class Gan(Branching):
    """Two optimizers, by hand; validation calls the generator alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Identity()  # type: ignore[assignment]
        self.critic = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        fake = self(torch.randn_like(batch[0]))
        for optimizer, loss in (
            (first, -self.critic(fake).mean()),
            (second, self.critic(fake.detach()).mean() - self.critic(batch[0]).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.trunk.parameters(), 1e-3), torch.optim.Adam(self.critic.parameters(), 1e-3)


class FrozenTeacher(Branching):
    """A larger frozen model inside, asked without gradients while training."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        return F.mse_loss(self(batch[0]), wanted)


class TargetNetwork(Branching):
    """An average of the trunk inside, moved behind every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.trunk).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.target(batch[0])
        return F.mse_loss(self.trunk(batch[0]), wanted) + self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for p, average in zip(self.trunk.parameters(), self.target.parameters(), strict=True):
            average.data.lerp_(p.data, 0.1)


class SelfSupervised(Branching):
    """A projector that only training has; validation looks at features."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
        self.head = nn.Identity()  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, two = (F.normalize(self.projector(self(batch[0] + torch.randn_like(batch[0])))) for _ in range(2))
        return F.cross_entropy(one @ two.T, torch.arange(len(one)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).var())

    test_step = validation_step


class SharedWeights(Branching):
    """Two branches of one weight; the second is of prediction alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = nn.Linear(16, 32)
        self.mirror.weight = self.trunk[0].weight  # type: ignore[assignment]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.trunk[1:](self.mirror(batch[0])))


class LooksAtData(Branching):
    """Which of two layers runs is decided by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(24, 20), nn.Linear(24, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.head((self.positive(x) if x.mean() > 0 else self.negative(x)).relu())


class RareBranch(Branching):
    """A layer for data that training never has, chosen by a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk[:2](x)
        x = self.rare(x).relu() if float(x.max()) > 1e3 else self.trunk[2:](x)
        return self.head(x)

    def predict_dataloader(self) -> Any:
        return items(lambda: (torch.full((8, 16), 1e6), torch.arange(8) % 4))


class EarlyExit(Branching):
    """Out of the first exit that is sure, unless it trains: then out of all."""

    def __init__(self) -> None:
        super().__init__()
        self.exit = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.trunk[:2](x)
        early = self.exit(x)
        if self.training:
            return early, self.head(self.trunk[2:](x))
        if early.softmax(-1).amax(-1).min() > 0.9:
            return early
        return self.head(self.trunk[2:](x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(out, batch[1]) for out in self(batch[0]))  # type: ignore[return-value]


class Experts(Branching):
    """Each sample goes through the expert that a router chooses; one without samples does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(24, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24)) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        chosen = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if mine.any():
                y[mine] = expert(x[mine])
        return self.head(x + y)


class UnusedHead(Branching):
    """A head that nothing calls at all."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(24, 7)


# ---- batches without a first axis


class Graph(Branching):
    """Nodes, edges between them, and to which graph each node belongs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 24)])  # type: ignore[assignment]

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor, num_graphs: int) -> Tensor:  # type: ignore[override]
        for layer in self.trunk:
            y = layer(x)
            x = (y + torch.zeros_like(y).index_add(0, edges[1], y[edges[0]])).relu()
        return self.head(torch.zeros(num_graphs, x.shape[1]).index_add(0, graph, x))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(*batch[:-1]), batch[-1])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(*batch[:-1])

    def train_dataloader(self) -> Any:
        def make() -> Any:
            graph = torch.arange(21) % 3
            return torch.randn(21, 16), torch.randint(0, 21, (2, 60)), graph.sort().values, 3, torch.tensor([0, 1, 2])

        return items(make)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Images(Branching):
    """A list of images of unlike sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3), nn.ReLU())

    def forward(self, x: list[Tensor]) -> Tensor:  # type: ignore[override]
        return self.head(torch.stack([self.trunk(image[None]).mean((0, 2, 3)) for image in x]))

    def train_dataloader(self) -> Any:
        sizes = (8, 9, 11)
        return items(lambda: ([torch.randn(3, n, n + 2) for n in sizes], torch.arange(3)))

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Packed(Branching):
    """Sequences of unlike lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24))
        self.gru = nn.GRU(24, 24)

    def forward(self, x: PackedSequence) -> Tensor:  # type: ignore[override]
        return self.head(self.gru(x._replace(data=self.trunk(x.data)))[1][-1])

    def train_dataloader(self) -> Any:
        return items(lambda: (pack_sequence([torch.randn(n, 16) for n in (7, 5, 2)]), torch.arange(3)))

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Adjacent(Branching):
    """A sparse matrix beside dense features."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(torch.sparse.mm(adjacency, self.trunk(x)))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(*batch[0]), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(*batch[0])

    def train_dataloader(self) -> Any:
        return items(lambda: ((torch.randn(9, 16), torch.eye(9).to_sparse()), torch.arange(9) % 4))

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@dataclass
class Features:
    values: Tensor
    scale: float
    name: str


class Batch(NamedTuple):
    features: Features
    mask: Tensor | None
    extra: dict[str, Any]
    target: Tensor


class Nested(Branching):
    """A named tuple of a dataclass, of nothing and of a dict; forward takes keywords alone."""

    def forward(  # type: ignore[override]
        self, *, features: Features, mask: Tensor | None = None, extra: dict[str, Any]
    ) -> dict[str, Tensor]:
        x = features.values * features.scale
        x = x if mask is None else x * mask
        shift = extra["shifts"][0]
        return {"logits": self.head(self.trunk(x + shift)), "size": torch.tensor(len(features.name))}

    def loss(self, batch: Batch) -> Tensor:
        out = self(features=batch.features, mask=batch.mask, extra=batch.extra)
        return F.cross_entropy(out["logits"], batch.target)

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        return self(features=batch.features, extra=batch.extra)

    def train_dataloader(self) -> Any:
        return items(
            lambda: Batch(
                Features(torch.randn(8, 16), 0.5, "rows"),
                None,
                {"shifts": [torch.randn(8, 16)], "kind": "plain"},
                torch.arange(8) % 4,
            )
        )

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
