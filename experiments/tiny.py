"""The four nets of MLPerf Tiny (Banbury 2021, arXiv:2106.07597) and two for digits, with real data of their kind.

Widths and depths are those of MLPerf's reference models; the data are what is at hand, and each loader says what.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.tasks import Data, fsdd, mel, mnist, read, roll6_mask6
from lightning_compress.demo.models import Block

__all__ = ["DIGITS", "NETS", "Tiny"]

_MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
_STD = torch.tensor([0.247, 0.243, 0.262]).view(3, 1, 1)
_ANIMALS = torch.tensor([2, 3, 4, 5, 6, 7])  # bird, cat, deer, dog, frog, horse
_SPEAKER = 0  # the first by name is heard in the test alone


class Mean(nn.Module):
    """Mean over an image; two axes are left."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, channels)."""
        return x.mean((2, 3))


def convolution(
    num_in: int, num_out: int, size: int | tuple[int, int] = 3, stride: int = 1, groups: int = 1
) -> nn.Module:
    """With batch norm and relu; an odd kernel keeps height and width at a stride of 1."""
    height, width = size if isinstance(size, tuple) else (size, size)
    padding = (height - 1) // 2, (width - 1) // 2
    conv = nn.Conv2d(num_in, num_out, (height, width), stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(num_out), nn.ReLU())


def separable(num_in: int, num_out: int, stride: int = 1) -> nn.Module:
    """A filter for each channel, then a 1x1 convolution (Howard 2017, arXiv:1704.04861)."""
    return nn.Sequential(convolution(num_in, num_in, 3, stride, groups=num_in), convolution(num_in, num_out, 1))


def ds_cnn(width: float = 1.0) -> nn.Module:
    """The keyword spotter (Zhang 2017, arXiv:1711.07128), for ten words instead of twelve."""
    a = max(1, round(64 * width))
    return nn.Sequential(convolution(1, a, (10, 4), 2), *(separable(a, a) for _ in range(4)), Mean(), nn.Linear(a, 10))


def resnet8() -> nn.Module:
    """The image classifier: three residual blocks."""
    blocks = Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)
    return nn.Sequential(convolution(3, 16), *blocks, Mean(), nn.Linear(64, 10))


def autoencoder() -> nn.Module:
    """The detector of anomalies: 640 values through 8."""
    widths = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out, bias=False), nn.BatchNorm1d(num_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 640))


def mobilenet() -> nn.Module:
    """MobileNetV1 of a quarter of the width, for images of 96 x 96 and two classes."""
    widths = [8, 16, 32, 32, 64, 64, *[128] * 6, 256, 256]
    layers = [convolution(3, 8, 3, 2)]
    for i, (num_in, num_out) in enumerate(pairwise(widths)):
        layers.append(separable(num_in, num_out, 2 if i in (1, 3, 5, 11) else 1))
    return nn.Sequential(*layers, Mean(), nn.Linear(256, 2))


def digits(*widths: int) -> Callable[[], nn.Module]:
    """Convolutions of 3 x 3 of which all but the first and the last halve the image."""

    def build() -> nn.Module:
        layers = [convolution(1, widths[0], 3)]
        for i, (num_in, num_out) in enumerate(pairwise(widths)):
            layers.append(convolution(num_in, num_out, 3, 1 if i == len(widths) - 2 else 2))
        return nn.Sequential(*layers, Mean(), nn.Linear(widths[-1], 10))

    return build


def strokes(*widths: int) -> Callable[[], nn.Module]:
    """Convolutions of 3 x 3 that halve the image, without norms: few numbers to keep.

    The last halves nothing and is dilated instead, so that it sees most of a digit.
    """

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for i, (num_in, num_out) in enumerate(pairwise((1, *widths))):
            stride, dilation = (1, 2) if i == len(widths) - 1 else (2, 1)
            layers += [nn.Conv2d(num_in, num_out, 3, stride, dilation, dilation), nn.ReLU()]
        return nn.Sequential(*layers, Mean(), nn.Linear(widths[-1], 10))

    return build


@cache
def cifar10(folder: Path) -> Data:
    """CIFAR-10 (Krizhevsky 2009) as JPEG images, uint8."""
    from PIL import Image

    what = "CIFAR-10 as an npz of jpeg (bytes of all images), offsets, labels, is_train"
    file = read(folder, "cifar10_jpeg.npz", what)
    data, ends = file["jpeg"].tobytes(), file["offsets"]
    pictures = [Image.open(io.BytesIO(data[a:b])).convert("RGB").tobytes() for a, b in pairwise(ends)]
    x = torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8).view(-1, 32, 32, 3).permute(0, 3, 1, 2)
    y, train = torch.from_numpy(file["labels"]).long(), torch.from_numpy(file["is_train"]).bool()
    return Data(x[train].contiguous(), y[train], x[~train].contiguous(), y[~train])


def animals(folder: Path) -> Data:
    """CIFAR-10 in two classes, animals and vehicles: there is no set of persons at hand."""
    data = cifar10(folder)
    train, test = (torch.isin(y, _ANIMALS).long() for y in (data.y_train, data.y_test))
    return Data(data.x_train, train, data.x_test, test)


def frames(folder: Path) -> Data:
    """Five log-mel frames of 128 bands, of spoken digits; whether a clip's speaker was left out of the training."""
    file = read(folder, "fsdd.npz", "the Free Spoken Digit Dataset as an npz of x, y digit, s speaker, i take")
    names = sorted(set(file["s"].tolist()))
    strange = torch.from_numpy(file["s"] == names[_SPEAKER])
    test = torch.from_numpy(file["i"] < 5)
    x = (mel(torch.from_numpy(file["x"]), 8000, 128, 1024) + 1e-6).log()[:, :, :40]
    x = x.transpose(1, 2).reshape(len(x), -1, 640)
    known = x[~test & ~strange].flatten(0, 1)
    x = (x - known.mean()) / known.std()
    return Data(x[~test & ~strange].flatten(0, 1), torch.zeros(0), x[test].flatten(0, 1), strange[test].long())


def normalized(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Images of CIFAR-10 as floats; with a generator half of them mirrored, and all moved by up to 4."""
    x = (x / 255 - _MEAN) / _STD
    if generator is None:
        return x
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x, x.flip(3))
    return moved(x, generator, 4)


def enlarged(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The same at 96 x 96."""
    return F.interpolate(normalized(x, generator), scale_factor=3, mode="bilinear")


def moved(x: Tensor, generator: torch.Generator, reach: int = 2) -> Tensor:
    """A batch of images moved by up to ``reach`` pixels, in four parts."""
    parts = []
    for part in x.chunk(4):
        across, down = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        padded = F.pad(part, [reach] * 4, value=float(part.min()))
        h, w = part.shape[2:]
        parts.append(padded[:, :, reach + down : reach + down + h, reach + across : reach + across + w])
    return torch.cat(parts)


def turned(x: Tensor, generator: torch.Generator) -> Tensor:
    """Digits turned by up to 10 degrees, larger or smaller by up to a tenth and moved by up to 2 pixels."""
    angle = (torch.rand(len(x), generator=generator) * 2 - 1) * 0.175
    scale = 1 + (torch.rand(len(x), generator=generator) * 2 - 1) * 0.1
    move = (torch.rand(len(x), 2, generator=generator) * 2 - 1) / 7
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    low = float(x.min())
    return F.grid_sample(x - low, grid, align_corners=False) + low


def images(folder: Path) -> Data:
    """MNIST with an axis of channels."""
    data = mnist(folder)
    return Data(data.x_train.unsqueeze(1), data.y_train, data.x_test.unsqueeze(1), data.y_test)


def _as_it_is(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return x


@dataclass(frozen=True)
class Tiny:
    """A net and how it is trained.

    Args:
        build: Makes the net.
        load: Reads the data from a folder.
        prepare: What the net is given of a batch; with a generator it is augmented.
        epochs: Passes over the training part.
        steps: Steps at most.
        batch_size: Examples a step.
        learning_rate: At the start; a cosine leads it to 0.
        weight_decay: L2 penalty.
        reference: Bytes of flash and of arena of MLPerf's reference file in the same interpreter, where known.
        packed: Whether what is small of it is the packed checkpoint, with weights of 4 bits.
    """

    build: Callable[[], nn.Module]
    load: Callable[[Path], Data]
    prepare: Callable[..., Tensor] = _as_it_is
    epochs: int = 10
    steps: int = -1
    batch_size: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    reference: tuple[int | None, int | None] = (None, None)
    packed: bool = False


def _masked(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return x if generator is None else roll6_mask6(x, generator)


def _turned(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return x if generator is None else turned(x, generator)


NETS = {
    "DS-CNN": Tiny(ds_cnn, fsdd, _masked, epochs=20, reference=(54_000, None)),
    "ResNet-8": Tiny(resnet8, cifar10, normalized, 4, learning_rate=0.05, reference=(98_000, 55_984)),
    "autoencoder": Tiny(autoencoder, frames, epochs=20, learning_rate=0.02, reference=(None, 3_984)),
    "MobileNetV1 .25": Tiny(mobilenet, animals, enlarged, 1, 600, 32, learning_rate=0.05, reference=(None, 103_680)),
}

DIGITS = {
    "MNIST, 16 kB": Tiny(digits(8, 16, 20, 20), images, _turned, 24, -1, 128, 0.1, 1e-4),
    "MNIST, 2,579 B": Tiny(strokes(6, 9, 9), images, _as_it_is, 12, -1, 128, 0.05, 1e-5, packed=True),
}
