"""Bias correction: the mean error that quantized weights make, taken out of the bias (Nagel 2019, arXiv:1906.04721).

Section 4.2: E[y~] = E[y] + (W~ - W) E[x]. Here the last term is measured while ranges are observed in float, as the
mean difference of a layer's output with quantized and with plain weights, borders and strides included. What the
rounding of activations adds is neglected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers import Layer
from lightning_compress.quantization.fake_quant import weights

__all__ = ["BiasCorrection"]


class BiasCorrection:
    """Measures the mean error of each layer's output channels as hooks, then corrects them.

    Args:
        layers: The layers with quantized weights, which are disabled until the hooks are removed.
        norms: The batch norm folded into a layer, by the layer's name.
    """

    def __init__(self, layers: Sequence[Layer], norms: Mapping[str, nn.Module]) -> None:
        self.left: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}
        self._norms = norms
        self._layers: dict[str, Layer] = {}
        for layer in layers:
            if layer.axes or not isinstance(layer.module, nn.Linear | nn.modules.conv._ConvNd):
                self.left[layer.name] = "neither a linear layer nor a convolution"
            elif layer.module._parameters.get("bias") is None and layer.name not in norms:
                self.left[layer.name] = "neither a bias nor a folded batch norm"
            else:
                module: Any = layer.module
                num = module.out_features if isinstance(module, nn.Linear) else module.out_channels
                self._layers[layer.name] = layer
                # the sum of the errors of each channel, and how many there were
                self.sums[layer.name] = torch.zeros(num + 1, dtype=torch.float64)
        self._handles = [
            layer.module.register_forward_hook(partial(self._see, layer), with_kwargs=True)
            for layer in self._layers.values()
        ]

    @torch.no_grad()
    def _see(self, layer: Layer, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        quantizer = weights(module)[layer.parameter]
        quantizer.enabled = True
        quantized = module.forward(*args, **kwargs)
        quantizer.enabled = False
        error = quantized - module.forward(*args, **kwargs)  # not the output, which other hooks may have changed
        axis = -1 if isinstance(module, nn.Linear) else 1 - layer.weight.dim()
        errors = error.movedim(axis, 0).flatten(1)
        self.sums[layer.name][:-1] += errors.float().sum(1).cpu()
        self.sums[layer.name][-1] += errors.shape[1]

    def remove(self) -> None:
        """Leave the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def apply(self) -> None:
        """Take the mean errors out of the biases, or into the means of the batch norms."""
        for name, layer in self._layers.items():
            *_, count = self.sums[name]
            if not count:
                self.left[name] = "it was not called"
                continue
            error = self.sums[name][:-1] / count
            bias: Tensor | None = layer.module._parameters.get("bias")
            if bias is not None:
                bias.sub_(error.to(bias))
            else:
                mean: Any = self._norms[name].running_mean
                mean.add_(error.to(mean))
