"""One weight that a method works on: its axes, and values in its shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.computed import computed_weight

__all__ = ["EMBEDDING", "PRUNABLE", "QUANTIZABLE", "Layer"]

_CONVOLUTION = (nn.modules.conv._ConvNd,)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
EMBEDDING: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)
PRUNABLE: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTION, nn.MultiheadAttention, *_RECURRENT)
QUANTIZABLE: tuple[type[nn.Module], ...] = (*PRUNABLE, *EMBEDDING)


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight that a method works on.

    Args:
        name: The module's name, with the parameter's name behind it where a module holds several weights.
        module: The module that holds the weight.
        parameter: Key of the weight in the module's parameters.
        seen: What a criterion observed of this layer during training, averaged.
        norm: The batch norm right behind the layer, where a criterion asked for it.
        whole: The weight gathered from all processes, where it is sharded and a criterion is to see all of it.
        axes: What each axis of a raw parameter is in the product, one letter per axis: ``o`` outputs, ``i`` inputs,
            ``k`` positions of a kernel, ``e`` weights side by side, such as those of experts. Empty for torch's own
            layers, whose class says it.
        source: The parameter, from the module on, that a weight is computed from; empty where it is stored as it is.
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    seen: Tensor | None = None
    norm: nn.Module | None = None
    whole: nn.Parameter | None = None
    axes: str = ""
    source: str = ""

    @property
    def weight(self) -> nn.Parameter:
        """The stored weight, whatever the module shows under that name; what it is computed from, where it is."""
        if self.whole is not None:
            return self.whole
        if self.source:
            return self.module.get_parameter(self.source)
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def multiplied(self) -> Tensor:
        """What the layer multiplies by: the stored weight, or what is computed from it, detached."""
        return computed_weight(self.module, self.source) if self.source else self.weight

    @property
    def gradient(self) -> Tensor | None:
        """Its gradient, detached; dense also where an embedding gives a sparse one."""
        gradient = self.weight.grad
        if gradient is None:
            return None
        return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()

    @property
    def module_name(self) -> str:
        """Name of the module that holds the weight: without the parameter's, where that stands in the layer's name."""
        if self.parameter == "weight" and isinstance(self.module, QUANTIZABLE):
            return self.name
        return self.name.removesuffix(self.parameter).removesuffix(".")

    @property
    def out_axis(self) -> int:
        """Axis of the output channels; of a grouped transposed convolution, of those of one group.

        Of a raw parameter the last one that holds outputs; experts share it.
        """
        if self.axes:
            return max(self.axes.rfind("o"), self.axes.rfind("e") if "o" not in self.axes else 0)
        return 1 if getattr(self.module, "transposed", False) else 0

    @property
    def num_outputs(self) -> int:
        """Output channels: features of a linear layer, channels of a convolution, rows of any other weight."""
        return self.weight.shape[self.out_axis] * (self._groups if self.out_axis == 1 and not self.axes else 1)

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in a layer's inputs and outputs, counted from the end: a batch axis may be missing."""
        return 1 - self.weight.dim()

    def out_first(self, values: Tensor) -> Tensor:
        """A tensor of the weight's shape with its output channels first; :meth:`as_stored` turns it back.

        ============================  ===========================  ===========================
        layer                         weight                       output channels first
        ============================  ===========================  ===========================
        linear, recurrent, attention  (out, in)                    (out, in)
        convolution                   (out, in / groups, *kernel)  (out, in / groups, *kernel)
        transposed convolution        (in, out / groups, *kernel)  (out, in / groups, *kernel)
        raw, axes ``"io"``            (in, out)                    (out, in)
        raw, axes ``"eio"``           (experts, in, out)           (experts * out, in)
        ============================  ===========================  ===========================

        Example:
            >>> layer = Layer("up", nn.ConvTranspose1d(6, 4, 3, groups=2))
            >>> layer.weight.shape, layer.out_first(layer.weight).shape
            (torch.Size([6, 2, 3]), torch.Size([4, 3, 3]))
        """
        if self.axes:
            moved = values.permute(self._order)
            outputs, inputs = (self._sizes(values.shape, roles) for roles in ("eo", "i"))
            return moved.reshape(outputs.numel(), inputs.numel(), *self._sizes(values.shape, "k"))
        if self.out_axis == 0:
            return values
        return values.unflatten(0, (self._groups, -1)).transpose(1, 2).flatten(0, 1)

    def as_stored(self, values: Tensor) -> Tensor:
        """What :meth:`out_first` has turned, in the weight's shape again.

        Example:
            >>> layer = Layer("experts.w", nn.ParameterDict({"w": torch.randn(2, 3, 4)}), "w", axes="eio")
            >>> layer.out_first(layer.weight).shape, layer.as_stored(layer.out_first(layer.weight)).equal(layer.weight)
            (torch.Size([8, 3]), True)
        """
        if not self.axes:
            return self.out_first(values)
        order = self._order
        back = [order.index(axis) for axis in range(len(order))]
        return values.reshape([self.weight.shape[axis] for axis in order]).permute(back)

    @property
    def _order(self) -> list[int]:
        """The axes of a raw parameter: those of outputs first, experts before them, then inputs, then kernels."""
        return sorted(range(len(self.axes)), key=lambda axis: "eoik".index(self.axes[axis]))

    def _sizes(self, shape: torch.Size, roles: str) -> torch.Size:
        return torch.Size(shape[axis] for axis in self._order if self.axes[axis] in roles)

    def spread_outputs(self, values: Tensor) -> Tensor:
        """One value per output channel, in a shape that broadcasts against the weight.

        Example:
            >>> Layer("fc", nn.Linear(3, 2)).spread_outputs(torch.tensor([1.0, 2.0]))
            tensor([[1., 1., 1.],
                    [2., 2., 2.]])
        """
        return self._spread(values.view(-1, 1).expand(-1, self._num_columns))

    def spread_inputs(self, values: Tensor) -> Tensor:
        """One value per input channel, in a shape that broadcasts against the weight.

        Args:
            values: As many as the layer has inputs, or a divisor of that: behind a flatten, neighbouring inputs of a
                linear layer are of one channel.

        Example:
            >>> Layer("fc", nn.Linear(4, 1)).spread_inputs(torch.tensor([1.0, 2.0]))
            tensor([[1., 1., 2., 2.]])
        """
        each = values.repeat_interleave(self._num_columns * self._groups // len(values))
        rows = each.view(self._groups, 1, -1).expand(-1, self.num_outputs // self._groups, -1)
        return self._spread(rows.flatten(0, 1))

    @property
    def _groups(self) -> int:
        return getattr(self.module, "groups", 1)

    @property
    def _num_columns(self) -> int:
        """Inputs of one output channel, each with its kernel."""
        return self.weight.shape[1 - self.out_axis] // (self._groups if self.out_axis == 1 else 1)

    def _spread(self, values: Tensor) -> Tensor:
        """Values of shape (out, in / groups) as (rows, columns, 1, ...) of the weight."""
        stored = self.as_stored(values)
        return stored.view(*stored.shape, *[1] * (self.weight.dim() - 2))
