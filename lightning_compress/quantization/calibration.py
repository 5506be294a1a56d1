"""Post-training quantization, over batches that somebody else runs."""

from __future__ import annotations

import torch
from torch import nn

from lightning_compress.quantization.correct import BiasCorrection
from lightning_compress.quantization.equalize import equalize
from lightning_compress.quantization.model import ModelQuantization
from lightning_compress.quantization.pairs import Chains, find_pairs
from lightning_compress.quantization.processes import Processes
from lightning_compress.structure.unseen import sizes_of
from lightning_compress.trace import ran
from lightning_compress.ways import unseen

__all__ = ["Calibration"]


class Calibration:
    """Traces the first batch, observes the others in float, then quantizes.

    Args:
        model: The model.
        quantization: Its quantization, not enabled.
        processes: The processes that see batches of the same model.
        equalize: Whether to move scales between layers, behind the first batch.
        correct_bias: Whether to take the mean error of the quantized weights out of the biases, at the end.

    Example:
        >>> from lightning_compress.quantization import int8
        >>> from lightning_compress.quantization.model import quantize_layers
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> calibration = Calibration(model, quantize_layers(model, int8()), Processes())
        >>> for batch in torch.randn(2, 5, 3):
        ...     calibration.begin_batch()
        ...     outputs = model(batch)
        ...     calibration.end_batch(outputs)
        >>> calibration.is_complete
        True
        >>> calibration.quantize()
        {}
    """

    def __init__(
        self,
        model: nn.Module,
        quantization: ModelQuantization,
        processes: Processes,
        equalize: bool = False,
        correct_bias: bool = False,
    ) -> None:
        self.model = model
        self.quantization = quantization
        self.processes = processes
        self.equalize = equalize
        self.correct_bias = correct_bias
        self._correction: BiasCorrection | None = None

    def begin_batch(self, wrapped: bool = False) -> None:
        """Trace the batch that comes, or observe it, or both while layers have not run.

        Args:
            wrapped: Whether another module, such as DDP's wrapper, calls the model.
        """
        if self.quantization.placement is None:
            self.quantization.start_tracing(self.model, wrapped)
            return
        self.quantization.observe(True)
        if self.quantization.waiting:
            self.quantization.start_tracing(self.model, wrapped)
        if self.correct_bias and self._correction is None:
            folded = self.quantization.folded(self.model)
            self._correction = BiasCorrection(self.quantization.layers, folded)
            # compiled code would not notice the hooks
            torch.compiler.set_stance("force_eager")

    def end_batch(self, outputs: object = None) -> None:
        """Place quantizers and equalize, or stop observing.

        Args:
            outputs: What was computed from the batch; a value among it is used outside of the model, too.
        """
        watch = self.quantization.watch
        chains: Chains | None = None
        if self.equalize and watch is not None and self.quantization.placement is None:
            watch.use(outputs)
            chains = find_pairs(watch.trace, self.model, self.quantization.layers)
            # what did not run in this batch may read a layer, and would read its values scaled
            sizes = sizes_of(self.model, unseen(self.model, ran(watch.trace)))
            widths = {layer.name: layer.num_outputs for layer in self.quantization.layers}
            chains.pairs = [(first, second) for first, second in chains.pairs if widths[first] not in sizes]
        self.quantization.end_batch(self.model, self.processes)
        if chains is not None:
            equalize(self.model, self.quantization.layers, self.processes.share(chains))

    @property
    def is_complete(self) -> bool:
        """Whether a batch was observed, behind the one that was traced."""
        if self.quantization.placement is None:
            return False
        if self.correct_bias and self._correction is None:
            return False
        activations = self.quantization.activations.values()
        # where weights alone are quantized, the traced batch is enough
        return not activations or any(activation.has_seen for activation in activations)

    def quantize(self) -> dict[str, str]:
        """Correct the biases by what all processes saw, and quantize.

        Returns:
            The layers whose bias was to be corrected and was not, with the reason.
        """
        correction = self._stop_correction()
        if correction is not None:
            for name, sums in correction.sums.items():
                correction.sums[name] = self.processes.total(sums)
            correction.apply()
        self.quantization.quantize(self.processes)
        return {} if correction is None else correction.left

    def stop(self) -> None:
        """Leave the model without hooks, in the middle of a batch, too."""
        self._stop_correction()
        self.quantization.stop_tracing()

    def _stop_correction(self) -> BiasCorrection | None:
        correction = self._correction
        self._correction = None
        if correction is not None:
            correction.remove()
            torch.compiler.set_stance("default")
        return correction
