"""The pitch of generated tones in noise, by PESTO (Riou 2023, arXiv:2309.02265) as its authors trained it on MIR-1K.

Needs their package, of LGPL 3: ``pip install --no-deps --target outputs/data/pesto pesto-pitch==2.0.1``. Its net is the
model; its constant-Q transform makes the inputs, once. The tones are synthetic: eight harmonics in pink or white noise.
"""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.tasks import Data, Metric, Task, made_once

__all__ = ["TASKS", "build", "pitches", "weights"]

_RATE, _CLIP = 8_000, 2_048  # the longest filter of the transform at that rate
_CHANNELS = (40, 30, 30, 10, 3)
_BINS, _SHIFT, _CROPPED = 3, 20, 16  # bins a semitone; where the net's bins begin; bins that it does not see
_SHA256 = "16c32e06ddd950e3e4866dfa3c7f8a87c4988f8adf43e57977b189f031f26f3e"
_PACKAGE, _CACHE = Path("outputs/data/pesto"), Path("outputs/data/pitch.npz")


@cache
def _pesto(module: str) -> ModuleType:
    """A module of the package, which asks for torchaudio to read files alone."""
    if not (_PACKAGE / "pesto").is_dir():
        how = f"pip install --no-deps --target {_PACKAGE} pesto-pitch==2.0.1"
        raise FileNotFoundError(f"PESTO is missing. Run: {how}")
    missing = "torchaudio" not in sys.modules
    sys.path.insert(0, str(_PACKAGE))
    if missing:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        return import_module(module)
    finally:
        sys.path.remove(str(_PACKAGE))
        if missing:
            del sys.modules["torchaudio"]


def build(width: float = 1.0) -> nn.Module:
    """Its net, of 130,461 weights: a frame's spectrum to probabilities of 384 bins."""
    channels = [max(1, round(num * width)) for num in _CHANNELS]
    sizes: dict[str, Any] = {"n_bins_in": 219, "n_prefilt_layers": 3, "prefilt_kernel_size": 39, "residual": True}
    net: nn.Module = _pesto("pesto.model").Resnet1d(n_chan_layers=channels, output_dim=128 * _BINS, **sizes)
    return net


def weights(folder: Path) -> dict[str, Tensor]:
    """What its authors trained, wherever the data are."""
    _pesto("pesto.model")
    path = _PACKAGE / "pesto" / "weights" / "mir-1k_g7.ckpt"
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != _SHA256:
        raise ValueError(f"{path} is not that of pesto-pitch 2.0.1: sha256 is {found}.")
    state = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]  # these very bytes are known
    return {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}


def _tones(pitch: Tensor, odd: bool, generator: torch.Generator) -> Tensor:
    """A clip for each pitch, of all harmonics or the odd ones, in noise of -5 to 15 dB between white and pink."""
    time, order = torch.arange(_CLIP) / _RATE, torch.arange(1, 16, 2) if odd else torch.arange(1, 9)
    frequency = 440 * 2 ** ((pitch[:, None, None] - 69) / 12) * order[:, None]
    phase, size = torch.rand(2, len(pitch), 8, 1, generator=generator)
    waves = torch.sin(2 * torch.pi * (frequency * time + phase)) * size / order[:, None] ** 0.5
    x = (waves * (frequency < 3400)).sum(1)
    slope, snr, gain = torch.rand(3, len(pitch), 1, generator=generator)
    noise = torch.fft.rfft(torch.randn(len(pitch), _CLIP, generator=generator))
    noise = torch.fft.irfft(noise * torch.arange(1, _CLIP // 2 + 2) ** (-0.5 * slope))
    noise = noise * x.std(1, keepdim=True) / noise.std(1, keepdim=True) * 10 ** (-(20 * snr - 5) / 20)
    return (x + noise) * 10 ** (gain - 1.5)


@torch.no_grad()
def _made() -> dict[str, np.ndarray]:
    """Spectra in decibels and the bin of each pitch: 6,000 to train on, 1,500 to test, 500 of odd harmonics."""
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"harmonics": [1], "fmin": 27.5, "bins_per_semitone": _BINS, "n_bins": 251, "gamma": 7}
    transform = _pesto("pesto.data").Preprocessor(hop_size=1000 * _CLIP / 2 / _RATE, sampling_rate=_RATE, **settings)
    pitch = 40 + 40 * torch.rand(8_000, generator=generator)
    x = []
    for i, part in enumerate(pitch.split(500)):
        x.append(transform(_tones(part, i == 15, generator))[:, 1, :, _CROPPED:-_CROPPED])  # the frame in the middle
    return {"x": torch.cat(x).numpy(), "y": (_BINS * pitch + _SHIFT).numpy()}


def pitches(folder: Path) -> Data:
    """Spectra of 1 x 219, and bins; made once, then kept in ``outputs/data``."""
    made = made_once(_CACHE, _made)
    parts = [torch.from_numpy(made[key]).split((6_000, 1_500, 500)) for key in ("x", "y")]
    return Data(*(part.clone() for pair in zip(*parts, strict=True) for part in pair))


def surprise(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, with the target shared between the two bins around it."""
    low = y.floor().long()[:, None]
    share = y[:, None] - low
    logs = outputs.clamp(min=1e-8).log()
    return -((1 - share) * logs.gather(1, low) + share * logs.gather(1, low + 1)).mean()


def cents(outputs: Tensor, y: Tensor) -> Tensor:
    """Distance from the pitch, a semitone at most for each example, summed."""
    found: Tensor = _pesto("pesto.utils").reduce_activations(outputs, "alwa")
    return (100 * (found - y / _BINS).abs()).clamp(max=100).sum()


TASKS = {
    "pitch": Task(
        "pitch",
        build,
        pitches,
        *(None, 16, 1e-4, 4, 3e-4, 4, 5e-4, (0.9, 0.95)),
        metric=Metric("mean error, cents (100 at most)", cents, higher=False, least=0.3),
        loss=surprise,
        weights=weights,
        most_batches=40,
        optimizer="adamw",  # SGD at 0.01 loses what they trained
    )
}
