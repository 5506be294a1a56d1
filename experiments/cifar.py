"""CIFAR-10 as JPEG images, and the field's two residual networks for it with pretrained weights."""

from __future__ import annotations

import io
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.tasks import Data, Task, read

__all__ = ["CifarResNet", "cifar10", "pretrained", "task"]

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
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        num = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(num)))
        self.layer2 = nn.Sequential(*(Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(num)))
        self.layer3 = nn.Sequential(*(Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(num)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, batch by classes."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def pretrained(depth: int, folder: Path) -> nn.Module:
    """A network with the weights that its author trained on the original images."""
    path = folder / f"resnet{depth}_cifar10.safetensors"
    if not path.is_file():
        what = "the state dict of github.com/akamaster/pytorch_resnet_cifar10 as safetensors"
        raise FileNotFoundError(f"{path} is missing: {what}. Put it there, or name its folder with --data.")
    model = CifarResNet(depth)
    model.load_state_dict(load_file(path))
    made: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster
    return made


def cifar10(folder: Path) -> Data:
    """CIFAR-10 in its original split, decoded from JPEG, which takes half a minute."""
    import numpy as np
    from PIL import Image

    what = "CIFAR-10 as an npz of jpeg (bytes of all images), offsets (60001), labels, is_train"
    file = read(folder, "cifar10_jpeg.npz", what)
    data, offsets = file["jpeg"].tobytes(), file["offsets"].tolist()
    images = (Image.open(io.BytesIO(data[a:b])).convert("RGB") for a, b in pairwise(offsets))
    pixels = np.stack([np.asarray(image) for image in images])
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
    name, build = f"resnet{depth}", partial(pretrained, depth, folder)
    return Task(name, build, cifar10, crop_flip, 128, 1e-4, 1, 0.01, 1, rate, (0.9, 0.95))
