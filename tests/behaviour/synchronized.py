"""``sync_batchnorm=True``, which puts other modules in the place of batch norms, and takes them away again."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_compress.callbacks import ChannelPruning, QuantizationAwareTraining
from lightning_compress.phase import Phase
from lightning_compress.quantization.fake_quant import activations
from lightning_compress.quantization.model import quantization_of

from ..harness import make_module
from .forks import fork_group
from .launching import make


def _quantize(rank: int, folder: Path) -> None:
    module = make_module("conv+bn+residual")
    channels = ChannelPruning(0.3, phase=Phase(0.1, 0.3))
    for fit in range(2):  # the second begins with a model that is quantized
        quantize = QuantizationAwareTraining("int8", Phase(0.4, 0.5), Phase(0.5, 1.0))
        options = {"devices": 1, "strategy": "ddp", "sync_batchnorm": True, "max_epochs": 4}
        trainer = make(folder, *([channels] if fit == 0 else []), quantize, **options)
        trainer.fit(module)
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())
        quantization = quantization_of(module)
        assert quantization is not None
        hooked = [id(activation) for m in module.modules() for activation in activations(m)]
        assert sorted(hooked) == sorted(map(id, quantization.activations.values()))
        assert any(name.endswith("bn2:output") for name in quantization.activations), "none stands at a batch norm"
        assert torch.isfinite(trainer.callback_metrics["val_loss"])


def keep_quantizers(folder: Path) -> str:
    """A quantizer that stands at a batch norm stays there."""
    # Torch synchronizes on GPUs alone: here what is exchanged between processes is left out, and they are but one.
    with (
        patch.object(nn.SyncBatchNorm, "forward", nn.BatchNorm2d.forward),
        patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"),
    ):
        results = fork_group(1, lambda rank: _quantize(rank, folder), folder / "ranks")
    assert results == ["ok"], results[0]
    return "ok"
