"""Ten words in noise, spoken by Debian's espeak-ng: a synthetic stand-in for Speech Commands (arXiv:1804.03209).

Nothing is downloaded: ``apt-get install -y --no-install-recommends espeak-ng`` brings the voices of version 1.51, which
speak for three minutes, once. Thirty of the 101 voices are heard in the test part alone; elsewhere these speak as in
Scotland and in the Caribbean. What a clip is worth on microphones in rooms, this does not tell.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.tasks import Data, Task, made_once, mfcc, roll6_mask6
from experiments.tiny import ds_cnn

__all__ = ["TASKS", "WORDS", "keywords", "noisy"]

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")  # of Speech Commands
_SPOKEN_RATE, _RATE = 22_050, 8_000
_TAKES, _STRANGE_TAKES = 8, 1
_HOME, _ABROAD = "en-us", ("en-gb-scotland", "en-029")
_SNR = (-5.0, 15.0)  # dB
_SHA256 = "d444dfdc8a823ea414c3bf5d6be576ca3c0d63e57a00505a15b3d9f3b59d8d3f"
_CACHE = Path("outputs/data/keywords.npz")


def _espeak(*arguments: str) -> bytes:
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError("The voices are missing. Run: apt-get install -y --no-install-recommends espeak-ng")
    return subprocess.run(["espeak-ng", *arguments], capture_output=True, check=True).stdout


def _voices() -> list[str]:
    """In an order drawn at random, the same each time."""
    found = sorted(set(re.findall(r"!v/(\S+(?: \S+)*)", _espeak("--voices=variant").decode())))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def _at_8_khz(samples: np.ndarray) -> np.ndarray:
    """A second of it: what is longer is cut, what is shorter is followed by silence."""
    second = torch.zeros(_SPOKEN_RATE)
    samples = samples[:_SPOKEN_RATE]
    second[: len(samples)] = torch.from_numpy(samples.astype(np.float32))
    spectrum = torch.fft.rfft(second)[: _RATE // 2 + 1]
    return (torch.fft.irfft(spectrum, _RATE) * (_RATE / _SPOKEN_RATE)).round().clamp(-32_768, 32_767).short().numpy()


def _asked() -> Iterator[tuple[str, int, int, int]]:
    """Voice, part (0 to train on, 1 to test on, 2 elsewhere), word and number of the take."""
    voices = _voices()
    unheard = voices[: len(voices) * 3 // 10]
    for voice in voices:
        part = int(voice in unheard)
        yield from ((f"{_HOME}+{voice}", part, word, take) for word in range(10) for take in range(_TAKES))
    for accent in _ABROAD:
        for voice in unheard:
            yield from ((f"{accent}+{voice}", 2, word, i) for word in range(10) for i in range(_STRANGE_TAKES))


def _speak() -> dict[str, np.ndarray]:
    """All clips, with pitch and speed of each drawn at random; what the voices say is checked."""
    rng, digest = np.random.default_rng(1), hashlib.sha256()
    clips, words, parts = [], [], []
    for voice, part, word, _ in _asked():
        pitch, speed = rng.integers(25, 76), rng.integers(130, 221)
        said = _espeak("-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", WORDS[word])
        digest.update(said)
        clips.append(_at_8_khz(np.frombuffer(said[44:], np.int16)))
        words.append(word)
        parts.append(part)
    if digest.hexdigest() != _SHA256:
        raise ValueError(f"These are not the voices of espeak-ng 1.51: sha256 is {digest.hexdigest()}.")
    return {"x": np.stack(clips), "y": np.array(words), "part": np.array(parts)}


def noisy(clips: Tensor, snr: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Clips anywhere in their second, in noise between white and pink at so many decibels, louder or softer."""
    x = torch.stack([clip.roll(int(s)) for clip, s in zip(clips, _starts(clips, generator), strict=True)])
    x = x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    drawn = partial(torch.rand, len(x), 1, generator=generator)
    frequencies = torch.arange(1, x.shape[1] // 2 + 2)
    noise = torch.fft.rfft(torch.randn(x.shape, generator=generator)) * frequencies ** (-0.5 * drawn())
    noise = torch.fft.irfft(noise, x.shape[1])
    noise = noise / noise.square().mean(1, keepdim=True).sqrt()
    low, high = snr
    return (x + noise * 10 ** (-(low + (high - low) * drawn()) / 20)) * 10 ** (drawn() - 1.5)


def _starts(clips: Tensor, generator: torch.Generator) -> Tensor:
    """By how much each may be moved so that none of it comes around."""
    silent = (clips.abs() > 0.01 * clips.abs().amax(1, keepdim=True)).flip(1).int().argmax(1)
    return (silent * torch.rand(len(clips), generator=generator)).long()


def keywords(folder: Path) -> Data:
    """Cepstral coefficients of 1 x 47 x 10; the clips are kept in ``outputs/data``, their noise is drawn anew."""
    made = made_once(_CACHE, _speak)
    generator = torch.Generator().manual_seed(0)
    clips, y, part = (torch.from_numpy(made[key]) for key in ("x", "y", "part"))
    x = torch.cat([mfcc(noisy(some.float(), _SNR, generator)) for some in clips.split(500)])
    known = x[part == 0]
    x = ((x - known.mean((0, 1))) / known.std((0, 1))).unsqueeze(1)
    train, test, strange = (part == i for i in range(3))
    return Data(x[train], y[train].long(), x[test], y[test].long(), x[strange], y[strange].long())


def build(width: float = 1.0) -> nn.Module:
    """MLPerf Tiny's DS-CNN: 23,050 parameters."""
    return ds_cnn(width)


TASKS = {"keywords": Task("keywords", build, keywords, roll6_mask6, 64, 5e-4, 12, 0.1, 4, 0.03, (0.8, 0.9))}
