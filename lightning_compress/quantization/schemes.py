"""What is quantized how."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_compress.quantization import observers, quantizers
from lightning_compress.quantization.observers import MovingAverage, Observer
from lightning_compress.quantization.quantizers import Affine, Quantizer

__all__ = ["Scheme", "int8"]


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are quantized, and where.

    Args:
        weight: Quantizer of the weights.
        inputs: Quantizer of the activations; None leaves them in float.
        observer: What determines the range of the activations.
        weight_granularity: ``"channel"`` for one scale an output channel, ``"tensor"`` for one a weight.
        include: Name patterns of the layers to quantize; empty for all.
        exclude: Name patterns of layers to leave in float.
    """

    weight: Quantizer = field(default_factory=lambda: Affine(8, symmetric=True))
    inputs: Quantizer | None = field(default_factory=Affine)
    observer: Observer = field(default_factory=MovingAverage)
    weight_granularity: Literal["channel", "tensor"] = "channel"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse parts of the wrong kind, which Hydra's _target_ would let pass."""
        for name, kind, optional in (
            ("weight", Quantizer, False),
            ("inputs", Quantizer, True),
            ("observer", Observer, False),
        ):
            value = getattr(self, name)
            if not (isinstance(value, kind) or (optional and value is None)):
                raise TypeError(
                    f"Scheme.{name}={value!r}: accepted is a {kind.__name__}, for instance {kind.__module__}."
                )
        for name in ("include", "exclude"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.weight_granularity not in ("channel", "tensor"):
            raise ValueError(
                f"Scheme.weight_granularity={self.weight_granularity!r}: accepted are 'channel' and 'tensor'."
            )

    def to_state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint that loads without pickle."""
        return _to_state(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Scheme:
        """The scheme of :meth:`to_state`; classes of a user's own must be given again by hand.

        Raises:
            ValueError: If the state names a class that is not part of this package.
        """
        values: dict[str, Any] = {}
        for name, value in state.items():
            if name != "class":
                values[name] = _from_state(value) if isinstance(value, dict) else value
        return Scheme(**values)


def int8(include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Scheme:
    """8 bits: weights symmetric and one scale an output channel, activations asymmetric and one scale a tensor.

    Args:
        include: Name patterns of the layers to quantize; empty for all.
        exclude: Name patterns of layers to leave in float.

    Example:
        >>> int8(exclude=["head"]).weight.bits
        8
    """
    return Scheme(include=tuple(include), exclude=tuple(exclude))


def _to_state(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to_state(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    return list(value) if isinstance(value, list | tuple) else value


def _from_state(state: dict[str, Any]) -> Any:
    name = state["class"]
    kind = getattr(quantizers, name, None) or getattr(observers, name, None)
    if kind is None:
        raise ValueError(f"The checkpoint's scheme uses {name}, a class of your own: pass the scheme to the loader.")
    return kind(**{k: v for k, v in state.items() if k != "class"})
