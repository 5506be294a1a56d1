"""A quantizer in its place: what it learns, what it saw, and whether it is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.quantization.observers import Observer
from lightning_compress.quantization.quantizer import QParams, Quantizer
from lightning_compress.watch import unwatched

__all__ = ["ActivationFakeQuantize", "WeightFakeQuantize"]


class _FakeQuantize:
    """A quantizer with what training learns of its parameters.

    ``held`` is None until :meth:`hold`. The logarithms of what is learned stand in ``logarithms``, so that no step can
    take a value below 0.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.enabled = False
        self.held: QParams | None = None
        self.logarithms: dict[str, nn.Parameter] = {}

    def hold(self, qparams: QParams) -> None:
        """Learn on from these parameters, if the quantizer learns any."""
        if self.quantizer.learned:
            self.held = qparams
            self.logarithms = {
                name: nn.Parameter(getattr(qparams, name).detach().log()) for name in self.quantizer.learned
            }

    def _learned(self, device: torch.device) -> QParams | None:
        if self.held is None:
            return None
        if self.held.scale.device != device:
            self._move(device)
        return _each(self.held, lambda name, x: self.logarithms[name].exp() if name in self.logarithms else x)

    def _move(self, device: torch.device) -> None:
        assert self.held is not None
        self.held = _each(self.held, lambda name, x: x.to(device) if isinstance(x, Tensor) else x)
        for log in self.logarithms.values():
            log.data = log.data.to(device)

    def to_state(self) -> dict[str, Any]:
        """What is learned, as plain values; empty before :meth:`hold`."""
        if self.held is None:
            return {}
        fields = {name: value for name, value in self.held._asdict().items() if value is not None}
        fields |= {f"log_{name}": log for name, log in self.logarithms.items()}
        return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in fields.items()}

    def from_state(self, state: dict[str, Any]) -> None:
        """Restore from :meth:`to_state`."""
        logarithms = {k.removeprefix("log_"): v.clone() for k, v in state.items() if k.startswith("log_")}
        self.held = QParams(**{k: v for k, v in state.items() if not k.startswith("log_")}) if state else None
        self.logarithms = {name: nn.Parameter(value) for name, value in logarithms.items()}


class WeightFakeQuantize(_FakeQuantize):
    """Shows a weight as its quantized value.

    Args:
        quantizer: How the weight is written.
        axis: Axis of the channels that have a scale each; None for one scale.
        group: Number of neighboring weights of a channel that share a scale, or None. A weight whose channels it does
            not divide keeps one scale per channel.

    Shapes, for a weight of shape (out, in, *kernel): see :class:`~lightning_compress.quantization.QParams`.
    """

    def __init__(self, quantizer: Quantizer, axis: int | None, group: int | None = None) -> None:
        super().__init__(quantizer)
        self.axis = axis
        self.group = group

    def _grouped(self, weight: Tensor) -> tuple[Tensor, int | None]:
        """The weight as rows that share a scale, where there are groups; and the axis of the scales."""
        if self.group is None or self.axis is None or (weight.numel() // weight.shape[self.axis]) % self.group:
            return weight, self.axis
        return weight.movedim(self.axis, 0).reshape(-1, self.group), 0

    def _ungrouped(self, values: Tensor, weight: Tensor) -> Tensor:
        if values.shape == weight.shape:
            return values
        assert self.axis is not None
        return values.view(weight.movedim(self.axis, 0).shape).movedim(0, self.axis)

    def qparams(self, weight: Tensor) -> QParams:
        """Parameters as learned, or from the weight's present values; one per row of the grouped weight, if grouped."""
        learned = self._learned(weight.device)
        if learned is not None:
            return learned
        return self.quantizer.fit(*self._grouped(weight.detach().float()))

    def begin(self, weight: Tensor) -> None:
        """Learn on from the weight's present values, if the quantizer learns and has not begun."""
        if self.held is None and self.quantizer.learned:
            self.hold(self.qparams(weight))

    def keep(self, weight: Tensor, kept: Mapping[int, Tensor]) -> None:
        """Follow a weight that lost channels: kept indices by axis. What groups learned begins anew."""
        if self.held is None or not kept:
            return
        if self._grouped(weight)[0] is not weight or self.group is not None:
            self.held = None
            self.begin(weight)
        elif self.axis is not None and self.axis in kept:
            index = kept[self.axis]
            for_channels = partial(_select, index=index)
            self.held = _each(self.held, lambda name, x: x if name in ("axis", "levels") else for_channels(x))
            for log in self.logarithms.values():
                log.data = for_channels(log.data)
                log.grad = None

    def rewrite(self, quantizer: Quantizer) -> None:
        """Quantize in another way; what was learned is forgotten."""
        self.quantizer = quantizer
        self.held = None
        self.logarithms = {}

    def codes(self, weight: Tensor) -> tuple[Tensor, QParams]:
        """Integer codes of the weight, as int8 (uint8 where they begin at 0), and their parameters."""
        qparams = _each(self.qparams(weight), lambda name, x: x.detach() if isinstance(x, Tensor) else x)
        values, _ = self._grouped(weight.detach().float())
        codes = self.quantizer.quantize(values, qparams)
        kind = torch.uint8 if codes.numel() and codes.max() > 127 else torch.int8
        return self._ungrouped(codes.to(kind), weight), qparams

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight, or its fake-quantized value when enabled."""
        return unwatched(self._quantize, weight) if self.enabled else weight

    def _quantize(self, weight: Tensor) -> Tensor:
        with _in_float32(weight):
            values, axis = self._grouped(weight.float())
            learned = self._learned(weight.device)
            if learned is None:
                values = self.quantizer.fake_quantize_fitted(values, axis)
            else:
                values = self.quantizer.fake_quantize(values, learned)
            return self._ungrouped(values, weight).to(weight.dtype)


class ActivationFakeQuantize(_FakeQuantize):
    """Quantizes the input or the output of a module, as a hook, or what a function gives.

    Args:
        quantizer: How the activation is written.
        observer: What determines its range.
        of_input: Quantize the module's inputs rather than its output.
    """

    def __init__(self, quantizer: Quantizer, observer: Observer, of_input: bool) -> None:
        super().__init__(quantizer)
        self.observer = observer
        self.of_input = of_input
        self.observing = False
        self.state = observer.start()
        self._qparams: QParams | None = None

    @property
    def state(self) -> Tensor:
        """What the observer saw."""
        return self._state

    @state.setter
    def state(self, state: Tensor) -> None:
        self._state = state
        # of the range before
        self._qparams = None

    @property
    def range(self) -> Tensor:
        """The range to cover, low and high; (+inf, -inf) if nothing was seen."""
        return self.observer.range(self.state, self.quantizer)

    @property
    def has_seen(self) -> bool:
        """Whether the observer saw any value."""
        return bool(self.state[0] <= self.state[1])

    def qparams(self) -> QParams:
        """Parameters as learned, or from the range seen so far."""
        learned = self._learned(self.state.device)
        if learned is not None:
            return learned
        if self._qparams is None:
            self._qparams = self.quantizer.qparams(*self.range)
        return self._qparams

    def begin(self) -> None:
        """Learn on from the range seen, if the quantizer learns and has not begun."""
        if self.held is None and self.quantizer.learned and self.has_seen:
            self.hold(self.qparams())

    def quantize(self, x: object) -> Any:
        """The value observed and fake-quantized, as the flags say; what is not a float tensor passes."""
        if not isinstance(x, Tensor) or not torch.is_floating_point(x) or not (self.observing or self.enabled):
            return x
        with _in_float32(x):
            values = x.float()
            if self.state.device != x.device:
                self.state = self.state.to(x.device)
            # By the range of the batches before: of this one each process has seen but a part, until it ends.
            quantized = self.quantizer.fake_quantize(values, self.qparams()).to(x.dtype) if self.enabled else x
            if self.observing and self.held is None:
                self.state = self.observer.update(self.state, values.detach())
            return quantized

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: object) -> Any:
        """A forward pre-hook that is given the arguments by name, or a forward hook that is given the output."""
        return unwatched(self._hook, module, args, *rest)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], rest: Any) -> Any:
        if not self.of_input:
            return self.quantize(rest)
        names = ["query", "key", "value"] if isinstance(module, nn.MultiheadAttention) else []
        done: dict[int, Any] = {}  # attention may be given one tensor three times

        def quantized(x: Any) -> Any:
            if id(x) not in done:
                done[id(x)] = self._quantize_packed(x)
            return done[id(x)]

        num = max(len(names), 1)
        read = names[len(args) :] if names else [] if args else list(rest)[:1]
        changed = {key: quantized(rest[key]) for key in read if key in rest}
        return (*map(quantized, args[:num]), *args[num:]), rest | changed

    def _quantize_packed(self, x: Any) -> Any:
        if isinstance(x, PackedSequence):
            return x._replace(data=self.quantize(x.data))
        return self.quantize(x)


def _in_float32(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the device of a tensor."""
    device = x.device.type
    # where none is on there is none to turn off, which takes as long as to round a weight
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _each(qparams: QParams, change: Callable[[str, Any], Any]) -> QParams:
    """The parameters with every field changed, by name and value."""
    fields: dict[str, Any] = {name: change(name, value) for name, value in qparams._asdict().items()}
    return QParams(**fields)


def _select(values: object, index: Tensor) -> Any:
    """Those of the kept channels, where there is one value per channel."""
    return values.index_select(0, index.to(values.device)) if isinstance(values, Tensor) and values.dim() else values
