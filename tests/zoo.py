"""Unlike LightningModules, each with its data, for the behaviour matrix."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES, BATCH_SIZE = 4, 8  # batches an epoch


class Data:
    """Mix-in: dataloaders whose batches are all alike, so that a run resumed inside an epoch sees the same data."""

    def tensors(self) -> tuple[Tensor, ...]:
        raise AssertionError("each module says what its data are")

    def _loader(self) -> DataLoader:
        tensors = [t.repeat(BATCHES, *[1] * (t.dim() - 1)) for t in self.tensors()]
        return DataLoader(TensorDataset(*tensors), BATCH_SIZE)

    train_dataloader = val_dataloader = test_dataloader = _loader


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(num: int = 4) -> Tensor:
    return torch.arange(BATCH_SIZE) % num


class Classifier(Data, pl.LightningModule):
    inner = "net"

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def _evaluate(self, batch: Any, name: str) -> None:
        logits = self(batch[0])
        self.log(f"{name}_loss", F.cross_entropy(logits, batch[1]))
        self.log(f"{name}_acc", (logits.argmax(-1) == batch[1]).float().mean())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class ConvResidual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        self.net = nn.Sequential(stem, Residual(8), nn.MaxPool2d(2), head)

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(BATCH_SIZE, 1, 12, 12), classes()


class MLP(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.GELU())
        self.net.append(nn.Linear(32, 4))

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(BATCH_SIZE, 16), classes()


class Attention(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.net = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.embed(x)).mean(1))

    def tensors(self) -> tuple[Tensor, ...]:
        return torch.arange(BATCH_SIZE * 6).view(BATCH_SIZE, 6) % 20, classes()


class LSTM(Classifier):
    kind: type[nn.Module] = nn.LSTM
    inner = "head"

    def __init__(self) -> None:
        super().__init__()
        self.net = self.kind(6, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[0][:, -1])

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(BATCH_SIZE, 5, 6), classes()


class GRU(LSTM):
    kind = nn.GRU


class Boring(Data, BoringModel):
    inner = "layer"

    def tensors(self) -> tuple[Tensor, ...]:
        return (noise(BATCH_SIZE, 32),)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return super().validation_step(batch[0], batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().test_step(batch[0], batch_idx)
        self.log("test_loss", output["y"])
        return output


class ManualBoring(Boring, ManualOptimBoringModel):
    pass


class Transformer(Data, LightningTransformer):
    """Lightning's own demo; its prepare_data would download."""

    inner = "model"

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(vocab_size=24)

    def prepare_data(self) -> None:
        pass

    def tensors(self) -> tuple[Tensor, ...]:
        tokens = torch.arange(BATCH_SIZE * 6).view(BATCH_SIZE, 6) % 24
        return tokens, tokens.roll(1, 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.nll_loss(self(*batch), batch[1].view(-1)))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.nll_loss(self(*batch), batch[1].view(-1)))


class GAN(Data, pl.LightningModule):
    """Two networks, two optimizers, manual optimization."""

    inner = "generator"

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16))
        self.discriminator = nn.Sequential(nn.Linear(16, 24), nn.LeakyReLU(0.2), nn.Linear(24, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, z = batch
        first, second = self.optimizers()
        fake = self(z)
        target = torch.ones(len(real), 1, device=real.device)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(real), target)
        loss = loss + F.binary_cross_entropy_with_logits(self.discriminator(fake.detach()), 1 - target)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.toggle_optimizer(second)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(fake), target)
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self(batch[1]), batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.mse_loss(self(batch[1]), batch[0]))

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.discriminator.parameters(), 1e-3),
            torch.optim.SGD(self.generator.parameters(), 1e-2, momentum=0.9),
        ]

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(BATCH_SIZE, 16), noise(BATCH_SIZE, 8, seed=1)


class Branch(MLP):
    """A forward whose way depends on the data."""

    inner = "net.0"

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return self.other(y) if float(y.detach().mean()) > -100 else y


class DictOutput(MLP):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits, "probabilities": logits.softmax(-1)}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self(batch[0])["logits"], batch[1])}

    def _evaluate(self, batch: Any, name: str) -> None:
        self.log(f"{name}_loss", F.cross_entropy(self(batch[0])["logits"], batch[1]))


class Tied(Classifier):
    """An embedding and an output layer that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.decoder = nn.Linear(16, 20)
        self.decoder.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.net(self.embed(x)))[:, -1]

    def tensors(self) -> tuple[Tensor, ...]:
        return torch.arange(BATCH_SIZE * 6).view(BATCH_SIZE, 6) % 20, classes(20)


class Reused(Classifier):
    """One submodule that is called twice."""

    inner = "shared"

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 4)
        self.shared, self.relu = nn.Linear(24, 24), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first(x))
        return self.last(self.relu(self.shared(self.relu(self.shared(y)))))

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(BATCH_SIZE, 16), classes()


class Frozen(ConvResidual):
    """A pretrained part that stays frozen and in eval mode."""

    inner = "net.1"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 1, 3, 1, 1), nn.BatchNorm2d(1), nn.ReLU())
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if hasattr(self, "backbone"):
            self.backbone.eval()
        return self


class Foreign(Classifier):
    """Layers that no class tells of: a parametrization, a raw parameter; and one that is built in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 24))
        self.raw = nn.Parameter(noise(24, 24, seed=3) * 0.1)
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.linear(self.normed(x), self.raw))

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(BATCH_SIZE, 16), classes()


MODULES: dict[str, type[pl.LightningModule]] = {
    "conv+bn+residual": ConvResidual,
    "mlp": MLP,
    "attention": Attention,
    "lstm": LSTM,
    "gru": GRU,
    "boring": Boring,
    "manual-boring": ManualBoring,
    "transformer": Transformer,
    "gan": GAN,
    "branch": Branch,
    "dict": DictOutput,
    "tied": Tied,
    "reused": Reused,
    "frozen": Frozen,
    "foreign": Foreign,
}
