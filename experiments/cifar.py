"""CIFAR-10 as JPEG images, and the field's two residual networks for it with pretrained weights."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.tasks import Data, Task, read
from lightning_compress.files import replacing

__all__ = ["TASKS", "CifarResNet", "cifar10", "pretrained", "task"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without weights, option A of He 2015 (arXiv:1512.03385)."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.stride, self.missing = stride, (num_out - num_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Where the stride is 2, the shortcut takes every second pixel and pads the channels with zeros."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing, self.missing))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """A residual network of 20, 32, 44 or 56 layers for images of 3 x 32 x 32.

    Args:
        depth: Number of layers, 6 n + 2.
        width: All numbers of channels are multiplied by this.
    """

    def __init__(self, depth: int, width: float = 1.0) -> None:
        super().__init__()
        num = (depth - 2) // 6
        a, b, c = (max(2, round(channels * width / 2) * 2) for channels in (16, 32, 64))  # even: half is padded
        self.conv1 = nn.Conv2d(3, a, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.layer1 = nn.Sequential(*(Block(a, a, 1) for _ in range(num)))
        self.layer2 = nn.Sequential(*(Block(a if i == 0 else b, b, 2 if i == 0 else 1) for i in range(num)))
        self.layer3 = nn.Sequential(*(Block(b if i == 0 else c, c, 2 if i == 0 else 1) for i in range(num)))
        self.linear = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, batch by classes."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def build(depth: int, width: float = 1.0) -> nn.Module:
    """A network with new weights."""
    model: nn.Module = CifarResNet(depth, width)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster


def weights(depth: int, folder: Path) -> dict[str, Tensor]:
    """What its author trained on the original images."""
    path = folder / f"resnet{depth}_cifar10.safetensors"
    if not path.is_file():
        what = "the state dict of github.com/akamaster/pytorch_resnet_cifar10 as safetensors"
        raise FileNotFoundError(f"{path} is missing: {what}. Put it there, or name its folder with --data.")
    return load_file(path)


def pretrained(depth: int, folder: Path) -> nn.Module:
    """A network with those weights."""
    model = build(depth)
    model.load_state_dict(weights(depth, folder))
    return model


def cifar10(folder: Path) -> Data:
    """CIFAR-10 in its original split, decoded from JPEG once, which takes half a minute."""
    import numpy as np
    from PIL import Image

    path = Path("outputs/data/cifar10.npy")
    what = "CIFAR-10 as an npz of jpeg (bytes of all images), offsets (60001), labels, is_train"
    file = read(folder, "cifar10_jpeg.npz", what)
    if not path.is_file():
        data, offsets = file["jpeg"].tobytes(), file["offsets"].tolist()
        images = (Image.open(io.BytesIO(data[a:b])).convert("RGB") for a, b in pairwise(offsets))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as kept:
            np.save(kept, np.stack([np.asarray(image) for image in images]))
    pixels = np.load(path)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    x = x.sub_(torch.tensor(_MEAN).view(3, 1, 1)).div_(torch.tensor(_STD).view(3, 1, 1))
    y, train = torch.from_numpy(file["labels"]).long(), torch.from_numpy(file["is_train"])
    return Data(x[train], y[train], x[~train], y[~train])


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels either way, and mirrored or not."""
    num, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    down, right = torch.randint(0, 9, (2, num, 1, 1), generator=generator)
    rows, columns = torch.arange(height).view(1, -1, 1) + down, torch.arange(width).view(1, 1, -1)
    mirrored = torch.rand(num, 1, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, width - 1 - columns, columns) + right
    return padded[torch.arange(num).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)  # channels last, as it was read


def task(depth: int, folder: Path, rate: float = 0.01) -> Task:
    """A pretrained network that is adapted to the JPEG images in one epoch, and compressed in one."""
    name, make = f"resnet{depth}", partial(pretrained, depth, folder)
    return Task(name, make, cifar10, crop_flip, 128, 1e-4, 1, 0.01, 1, rate, (0.9, 0.95))


def _short(depth: int) -> Task:
    """The same in the benchmark: 400 steps adapt the network, and 200 compress it."""
    return replace(
        task(depth, Path()),
        build=partial(build, depth),
        epochs=2,
        weights=partial(weights, depth),
        most_batches=200,
    )


TASKS = {task.name: task for task in (_short(20), _short(56))}
