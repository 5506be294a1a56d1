"""Three small tasks on real data that can be trained in seconds: models, data, augmentation, hyper-parameters.

A run's batches depend on the task, the seed and the step alone, so that every method sees the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.files import replacing

__all__ = [
    "ACCURACY",
    "LENET5",
    "TASKS",
    "Batches",
    "Classifier",
    "Data",
    "Metric",
    "Task",
    "TaskData",
    "data_folder",
    "made_once",
    "mel",
    "mfcc",
    "optimizer_of",
    "read",
]


Optimizer = Literal["sgd", "adamw"]


def _wide(num: int, width: float, least: int = 1) -> int:
    return max(least, round(num * width))


def lenet300(width: float = 1.0) -> nn.Module:
    """LeNet-300-100: 266,610 parameters."""
    a, b = _wide(300, width), _wide(100, width, 10)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10))


def lenet5(width: float = 1.0) -> nn.Module:
    """LeNet-5 as Caffe and Deep Compression (Han 2016, arXiv:1510.00149) have it: 431,080 parameters."""
    a, b, c = _wide(20, width), _wide(50, width), _wide(500, width, 10)
    model: nn.Module = nn.Sequential(
        *(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, a, 5), nn.MaxPool2d(2), nn.Conv2d(a, b, 5), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * b, c), nn.ReLU(), nn.Linear(c, 10)),
    )
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.7 times as fast


class Residual1d(nn.Module):
    """Two convolutions of five around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(width, width, 5, padding=2, bias=False), nn.BatchNorm1d(width)
        self.conv2, self.norm2 = nn.Conv1d(width, width, 5, padding=2, bias=False), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Mean(nn.Module):
    """Mean over all that is not batch or channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Two axes are left."""
        return x.flatten(2).mean(2)


def res1d(width: float = 1.0) -> nn.Module:
    """A residual network over time: 62,826 parameters."""
    a, b = _wide(32, width), _wide(64, width)
    return nn.Sequential(
        *(nn.Conv1d(1, a, 5, padding=2, bias=False), nn.BatchNorm1d(a), nn.ReLU(), Residual1d(a)),
        *(nn.Conv1d(a, b, 5, 2, padding=2, bias=False), nn.BatchNorm1d(b), nn.ReLU(), Residual1d(b)),
        *(Mean(), nn.Linear(b, 10)),
    )


def ds_cnn(width: float = 1.0) -> nn.Module:
    """Depthwise-separable network for keywords (Zhang 2017, arXiv:1711.07128): 23,050 parameters."""
    a = _wide(64, width)
    layers = [nn.Conv2d(1, a, (10, 4), 2, (5, 1), bias=False), nn.BatchNorm2d(a), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(a, a, 3, padding=1, groups=a, bias=False), nn.BatchNorm2d(a), nn.ReLU()]
        layers += [nn.Conv2d(a, a, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU()]
    model: nn.Module = nn.Sequential(*layers, Mean(), nn.Dropout(0.2), nn.Linear(a, 10))
    for parameter in model.parameters():
        if parameter.dim() == 4:  # a quarter faster
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def data_folder(folder: Path | None = None) -> Path:
    """The given folder, or the first usual one that exists; it need not exist where a task needs no files."""
    usual = [Path("data"), Path("shared/data"), Path("../shared/data")]
    return folder or next((path for path in usual if path.is_dir()), usual[0])


def read(folder: Path, name: str, source: str) -> dict[str, np.ndarray]:
    """The arrays of a file; without it the error says what it holds."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {source}. Put it there, or name its folder with --data.")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def made_once(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from a file, which is made where it is missing."""
    if not path.is_file():
        arrays = make()
        with replacing(path) as temporary, temporary.open("wb") as opened:
            np.savez_compressed(opened, allow_pickle=False, **arrays)
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@dataclass(frozen=True)
class Data:
    """Inputs and targets in memory.

    Args:
        x_train: Inputs to train on.
        y_train: Their targets.
        x_test: Inputs of the same kind to test on.
        y_test: Their targets.
        x_strange: Inputs of another kind to test on: a shift that the training part does not show.
        y_strange: Their targets.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    x_strange: Tensor | None = None
    y_strange: Tensor | None = None

    def cut(self, seed: int) -> Data:
        """The training part alone: five sixths to train on, and a sixth in the place of the test part."""
        order = torch.randperm(len(self.y_train), generator=torch.Generator().manual_seed(seed))
        test, train = order[: len(order) // 6], order[len(order) // 6 :]
        return Data(self.x_train[train], self.y_train[train], self.x_train[test], self.y_train[test])


def mnist(folder: Path) -> Data:
    """MNIST in its original split."""
    what = "MNIST as an npz of x_train (60000,28,28) uint8, y_train, x_test, y_test, for instance from Keras' mnist.npz"
    file = read(folder, "mnist70k.npz", what)
    x = {part: torch.from_numpy((file[f"x_{part}"] / 255 - 0.1307) / 0.3081).float() for part in ("train", "test")}
    y = {part: torch.from_numpy(file[f"y_{part}"]).long() for part in ("train", "test")}
    return Data(x["train"], y["train"], x["test"], y["test"])


def mnist1d(folder: Path) -> Data:
    """MNIST-1D (Greydanus 2020, arXiv:2011.14439), made by its package: 4,000 to train on, 4,000 to test."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The task mnist1d makes its data with a package. Run: pip install mnist1d") from error
    args = get_dataset_args()
    args.num_samples, args.train_split = 8000, 0.5
    made = make_dataset(args)
    x = {key: torch.from_numpy(made[key]).float().unsqueeze(1) for key in ("x", "x_test")}
    return Data(x["x"], torch.from_numpy(made["y"]).long(), x["x_test"], torch.from_numpy(made["y_test"]).long())


def mel(x: Tensor, rate: int = 8000, num_bands: int = 40, n_fft: int = 512) -> Tensor:
    """Power in mel bands of clips, in windows of 40 ms every 20 ms: clips by bands by windows."""
    window, hop = rate // 25, rate // 50
    spectrum = torch.stft(x, n_fft, hop, window, torch.hann_window(window), center=False, return_complex=True).abs()
    low, high = (1127 * np.log1p(f / 700) for f in (20.0, rate / 2))
    edges = 700 * np.expm1(np.linspace(low, high, num_bands + 2) / 1127)
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling))).float() @ spectrum.square()


def mfcc(x: Tensor, rate: int = 8000, num_bands: int = 40, num_terms: int = 10) -> Tensor:
    """Mel-frequency cepstral coefficients of clips: windows of 40 ms every 20 ms."""
    k, n = np.arange(num_terms)[:, None], np.arange(num_bands)
    dct = torch.from_numpy(np.cos(np.pi / num_bands * (n + 0.5) * k) * np.sqrt(2 / num_bands)).float()
    return (dct @ (mel(x, rate, num_bands) + 1e-6).log()).transpose(1, 2)


def fsdd(folder: Path) -> Data:
    """Spoken digits of six speakers; the first five takes of each digit and speaker are the test part."""
    what = "the Free Spoken Digit Dataset as an npz of x (3000,8000) float32 at 8 kHz, y digit, i take"
    file = read(folder, "fsdd.npz", what)
    x, y = mfcc(torch.from_numpy(file["x"])), torch.from_numpy(file["y"]).long()
    test = torch.from_numpy(file["i"] < 5)
    x = ((x - x[~test].mean((0, 1))) / x[~test].std((0, 1))).unsqueeze(1)
    return Data(x[~test], y[~test], x[test], y[test])


def _roll(x: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Every example rolled along its time axis, which is axis 2, by up to ``reach`` either way."""
    shift = torch.randint(-reach, reach + 1, (len(x), 1), generator=generator)
    index = (torch.arange(x.shape[2]) - shift) % x.shape[2]
    return x.gather(2, index.view(len(x), 1, -1, *[1] * (x.dim() - 3)).expand_as(x))


def roll3(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rolled by up to 3."""
    return _roll(x, 3, generator)


def roll6_mask6(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rolled by up to 6 frames, and 6 frames in a row set to the mean."""
    first = torch.randint(x.shape[2] - 5, (len(x), 1), generator=generator)
    frames = torch.arange(x.shape[2])
    masked = (frames >= first) & (frames < first + 6)
    return _roll(x, 6, generator).masked_fill(masked[:, None, :, None], 0.0)


@dataclass(frozen=True)
class Metric:
    """What a task is measured by.

    Args:
        name: With its unit, as tables have it.
        sum_of: Of outputs and targets: the metric, summed over the examples.
        higher: Whether more is better.
        least: The smallest difference that is worth a word.
    """

    name: str
    sum_of: Callable[[Tensor, Tensor], Tensor]
    higher: bool = True
    least: float = 0.3


def right(outputs: Tensor, y: Tensor) -> Tensor:
    """A hundred for each example whose class is found, so that their mean is per cent."""
    return 100.0 * (outputs.argmax(1) == y).sum()


ACCURACY = Metric("accuracy, %", right)


@dataclass(frozen=True)
class Task:
    """A model, its data, and how it is trained.

    Args:
        name: Its name.
        build: Makes the model, with all widths multiplied by a factor.
        load: Reads the data from a folder.
        augment: Changes a batch of training inputs.
        batch_size: Examples a step.
        weight_decay: L2 penalty.
        epochs: Epochs of the dense training.
        learning_rate: Its rate at the start; a cosine leads it to 0.
        compress_epochs: Epochs in which the trained model is compressed.
        compress_rate: The learning rate of these.
        sparsities: Two operating points where methods differ.
        metric: What is measured.
        loss: Mean over a batch, of outputs and targets.
        weights: Reads trained weights from the folder of the data, which ``epochs`` only adapt.
        most_batches: Of an epoch, where it is not the whole training part.
        optimizer: SGD with Nesterov momentum, or AdamW where that one fails.
        cuts: How many cuts of the training part a learning rate is chosen by: more where one of them is too small to
            tell rates apart.
    """

    name: str
    build: Callable[..., nn.Module]
    load: Callable[[Path], Data]
    augment: Callable[[Tensor, torch.Generator], Tensor] | None
    batch_size: int
    weight_decay: float
    epochs: int
    learning_rate: float
    compress_epochs: int
    compress_rate: float
    sparsities: tuple[float, float]
    metric: Metric = ACCURACY
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    weights: Callable[[Path], dict[str, Tensor]] | None = None
    most_batches: int | None = None
    optimizer: Optimizer = "sgd"
    cuts: int = 1


TASKS = {
    task.name: task
    for task in (
        Task("lenet300", lenet300, mnist, None, 128, 1e-4, 12, 0.1, 4, 0.05, (0.98, 0.99)),
        Task("mnist1d", res1d, mnist1d, roll3, 64, 5e-4, 24, 0.05, 10, 0.02, (0.97, 0.985)),
        Task("fsdd", ds_cnn, fsdd, roll6_mask6, 64, 5e-4, 20, 0.1, 6, 0.03, (0.92, 0.95)),
    )
}

LENET5 = Task("lenet5", lenet5, mnist, None, 128, 5e-4, 6, 0.02, 6, 0.02, (0.97, 0.98))  # of the benchmark packed alone


class Batches:
    """Batches sliced from memory: each pass is an epoch, whose order and augmentation follow from the seed.

    Args:
        x: Inputs.
        y: Classes.
        batch_size: Examples a batch; a smaller last one is left out.
        seed: Seed of the run.
        augment: Changes the inputs of a batch.
        most: Batches of an epoch at most.
    """

    def __init__(  # what a batch depends on
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        seed: int,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        most: int | None = None,
    ) -> None:
        self.x, self.y, self.batch_size, self.seed, self.augment, self.most = x, y, batch_size, seed, augment, most
        self.epoch = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        num = len(self.y) // self.batch_size
        return num if self.most is None else min(num, self.most)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The next epoch."""
        generator = torch.Generator().manual_seed(self.seed * 10_007 + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.y), generator=generator)
        for i in range(len(self)):
            index = order[i * self.batch_size : (i + 1) * self.batch_size]
            x = self.x[index]
            yield (x if self.augment is None else self.augment(x, generator)), self.y[index]


class TaskData(pl.LightningDataModule):
    """A task's data as Lightning takes it.

    Args:
        task: The task.
        data: Its data.
        seed: Seed of the order and the augmentation.
    """

    def __init__(self, task: Task, data: Data, seed: int) -> None:
        super().__init__()
        self.task, self.data, self.seed = task, data, seed

    def train_dataloader(self) -> Any:
        """Shuffled, augmented batches."""
        task, data = self.task, self.data
        return Batches(data.x_train, data.y_train, task.batch_size, self.seed, task.augment, task.most_batches)

    def val_dataloader(self) -> Any:
        """A few training examples, for callbacks that watch a validation step; nothing is chosen by them."""
        return Batches(self.data.x_train[:8], self.data.y_train[:8], 8, self.seed)


def optimizer_of(
    parameters: Iterable[nn.Parameter], rate: float, weight_decay: float, name: Optimizer = "sgd"
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, rate, weight_decay=weight_decay, foreach=True)
    return torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=weight_decay, foreach=True)


class Classifier(pl.LightningModule):
    """A loss by the task's optimizer and a cosine to zero over the steps of the run.

    Args:
        model: Gives the outputs.
        learning_rate: Rate at the start.
        weight_decay: L2 penalty.
        loss: Mean over a batch, of outputs and targets.
        optimizer: Its name.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        optimizer: Optimizer = "sgd",
    ) -> None:
        super().__init__()
        self.model, self.learning_rate, self.weight_decay, self.loss = model, learning_rate, weight_decay, loss
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        """Outputs."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch of (inputs, targets)."""
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The same, unlogged."""
        self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """With a cosine a step."""
        optimizer = optimizer_of(self.parameters(), self.learning_rate, self.weight_decay, self.optimizer)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
