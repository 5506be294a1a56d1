"""Nine categories of emoji, drawn by one vendor, and the same pictures as three others draw them.

The pictures are npm's: ``npm install --prefix outputs/data emoji-datasource-google@16.0.0
emoji-datasource-apple@16.0.0 emoji-datasource-facebook@16.0.0 emoji-datasource-twitter@16.0.0``. A fifth of the 1,906
are tested on, drawn at random: near twins (a man's and a woman's) fall on both sides.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.cifar import crop_flip
from experiments.tasks import Data, Mean, Task, made_once

__all__ = ["TASKS", "categories", "cnn"]

VENDORS = ("google", "apple", "facebook", "twitter")  # the first is trained on
_SIDE = 32
_SHA256 = "417f4c4b14b24205b6dba191e4af100251c87ab6f241c114d99a6e07406c90df"
_PLACES = (Path("outputs/data"), Path())
_CACHE = Path("outputs/data/emoji.npz")


def cnn(width: float = 1.0) -> nn.Module:
    """Four convolutions of 3 x 3: 61,353 parameters."""
    a, b, c = (max(1, round(channels * width)) for channels in (16, 32, 64))
    layers: list[nn.Module] = []
    for num_in, num_out, stride in ((3, a, 1), (a, b, 2), (b, c, 2), (c, c, 1)):
        layers += [nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()]
    model: nn.Module = nn.Sequential(*layers, Mean(), nn.Linear(c, 9))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster


def _packages() -> Path:
    for place in _PLACES:
        if all((place / "node_modules" / f"emoji-datasource-{vendor}").is_dir() for vendor in VENDORS):
            return place / "node_modules"
    packages = " ".join(f"emoji-datasource-{vendor}@16.0.0" for vendor in VENDORS)
    raise FileNotFoundError(f"The pictures are missing. Run: npm install --prefix {_PLACES[0]} {packages}")


def _read() -> dict[str, np.ndarray]:
    """Pixels of each vendor, whether there is one, and the category; the pictures' bytes are checked."""
    from PIL import Image

    folder = _packages()
    known = json.loads((folder / "emoji-datasource-google" / "emoji.json").read_text())
    known = [one for one in known if one["category"] != "Component" and one["has_img_google"]]
    names = sorted({one["category"] for one in known})
    digest = hashlib.sha256()
    found: dict[str, np.ndarray] = {"y": np.array([names.index(one["category"]) for one in known])}
    for vendor in VENDORS:
        pixels = np.full((len(known), _SIDE, _SIDE, 3), 255, np.uint8)
        drawn = np.zeros(len(known), bool)
        for i, one in enumerate(known):
            path = folder / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / one["image"]
            if not one[f"has_img_{vendor}"] or not path.is_file():
                continue
            digest.update(path.read_bytes())
            picture = Image.open(path).convert("RGBA")
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            white.alpha_composite(picture)
            pixels[i], drawn[i] = np.asarray(white.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)), True
        found |= {vendor: pixels, f"has_{vendor}": drawn}
    if digest.hexdigest() != _SHA256:
        raise ValueError(f"The pictures in {folder} are not those of version 16.0.0: sha256 is {digest.hexdigest()}.")
    return found


def categories(folder: Path) -> Data:
    """Pictures of 3 x 32 x 32 on white, which is 0; decoded once, then kept in ``outputs/data``."""
    made = made_once(_CACHE, _read)
    y = torch.from_numpy(made["y"]).long()
    x = {v: torch.from_numpy(made[v]).permute(0, 3, 1, 2).float().div_(127.5).sub_(2.0) for v in VENDORS}
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test = torch.zeros(len(y), dtype=torch.bool).scatter_(0, order[: len(y) // 5], True)
    drawn = {v: test & torch.from_numpy(made[f"has_{v}"]) for v in VENDORS[1:]}
    strange: tuple[Tensor, Tensor] = (
        torch.cat([x[v][drawn[v]] for v in drawn]),
        torch.cat([y[drawn[v]] for v in drawn]),
    )
    own = x[VENDORS[0]]
    return Data(own[~test], y[~test], own[test], y[test], *strange)


# a cut holds 254 pictures, on which a rate's accuracy has a standard error of 3 points
TASKS = {"emoji": Task("emoji", cnn, categories, crop_flip, 64, 5e-4, 40, 0.1, 12, 0.03, (0.9, 0.95), cuts=3)}
