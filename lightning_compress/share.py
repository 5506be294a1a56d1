"""How much of a model a method takes: of the weights that multiply, and of all parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_compress.layer import EMBEDDING, QUANTIZABLE, Layer
from lightning_compress.layers import every_weight

__all__ = ["Share", "share_taken"]

_SHOWN = 3
# What the user has asked for is no news.
_WISHES = ("excluded by name", "not included by name", "(keep_first)", "(keep_last)")


@dataclass(frozen=True)
class Share:
    """What of a model is taken.

    Args:
        taken: Weights that multiply and are taken.
        multiplying: Weights that multiply and are trained or taken, embeddings and what is tied to them apart.
        all: All parameters.
        left: Sizes of those that multiply, or may, and are not taken, by name; the largest first.
        reasons: Why each of them is not.
        frozen: Weights that are taken and not trained, as those under adapters.
    """

    taken: int
    multiplying: int
    all: int
    left: dict[str, int]
    reasons: dict[str, str]
    frozen: int = 0

    @property
    def words(self) -> str:
        """Both shares in a sentence."""
        weights = f"{self.multiplying - self.frozen} trainable"
        weights += f" and {self.frozen} frozen" if self.frozen else ""
        return (
            f"{_percent(self.taken, self.multiplying)} of the {weights} weights that multiply "
            "(embeddings and what is tied to them apart), "
            f"{_percent(self.taken, self.all)} of all {self.all} parameters."
        )

    @property
    def is_small(self) -> bool:
        """Whether less than half of the weights that multiply is taken, beside what the user has left out by name."""
        wished = sum(size for name, size in self.left.items() if self.reasons[name].endswith(_WISHES))
        return 2 * self.taken < self.multiplying - wished

    @property
    def largest(self) -> str:
        """The largest that are left alone, with the reasons."""
        names = list(self.left)[:_SHOWN]
        return "; ".join(f"{name} ({self.left[name]} weights: {self.reasons[name]})" for name in names)


@torch.no_grad()
def share_taken(model: nn.Module, layers: Sequence[Layer], skipped: Mapping[str, str]) -> Share:
    """How much of a model is taken.

    Args:
        model: The model.
        layers: What is taken.
        skipped: What is left alone, with the reason.

    Example:
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(3, 1))
        >>> share = share_taken(net, [Layer("1", net[1])], {"2": "excluded by name"})
        >>> share.taken, share.multiplying, share.all, share.largest
        (12, 15, 55, '2 (3 weights: excluded by name)')
    """
    apart = {id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, EMBEDDING)}
    ours = {id(layer.weight) for layer in layers}
    sizes: dict[str, int] = {}
    taken = frozen = 0
    seen = set(apart)
    for layer in every_weight(model):
        weight = layer.weight if layer.source else layer.module._parameters.get(layer.parameter)
        if isinstance(layer.module, EMBEDDING) or isinstance(weight, nn.UninitializedParameter):
            continue
        if not layer.axes and not isinstance(layer.module, QUANTIZABLE):
            continue
        shown = getattr(layer.module, layer.parameter, None) if weight is None else weight  # computed by other code
        is_frozen = weight is not None and not weight.requires_grad
        if shown is None or id(shown) in seen or (is_frozen and id(weight) not in ours):
            continue
        seen.add(id(shown))
        if id(weight) in ours:
            taken += shown.numel()
            frozen += shown.numel() if is_frozen else 0
        else:
            sizes[layer.name] = shown.numel()
    left = dict(sorted(sizes.items(), key=lambda item: -item[1]))
    return Share(
        taken,
        taken + sum(left.values()),
        sum(p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter)),
        left,
        {name: skipped.get(name, "no reason is known") for name in left},
        frozen,
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.0f} %"
