"""torchao's PARQ (Jin 2025, arXiv:2503.15748): a regularizer that grows hard pulls weights to a few values."""

from __future__ import annotations

import torch
from torch import nn
from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
from torchao.prototype.parq.quant import LSBQuantizer, UnifQuantizer

from experiments.peers.plain import input8
from experiments.training import WEIGHTED, Budget, train, weights_of

HARD = 0.8  # from this share of the steps on weights are what they are pulled to


def train_quantized(model: nn.Module, budget: Budget, bits: float) -> nn.Module:
    """A scale a channel; weights of 2 bits by least squares, others uniform. Activations are rounded by hand.

    Weights that lie channels last it (torchao 0.18) leaves as they are, without a word.
    """
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in [module for module in model.modules() if isinstance(module, WEIGHTED)]:
        module.register_forward_pre_hook(input8)
    quantizer = LSBQuantizer(optimal=False) if bits == 2 else UnifQuantizer()

    def pulled(sgd: torch.optim.Optimizer, num_steps: int) -> QuantOptimizer:
        [group] = sgd.param_groups
        weights = weights_of(model)
        others = [p for p in group["params"] if all(p is not w for w in weights)]
        group |= {"params": weights, "quant_bits": int(bits)}
        sgd.add_param_group({"params": others, "quant_bits": 32})
        pull = ProxPARQ(0, int(HARD * num_steps))
        return QuantOptimizer(sgd, quantizer, pull, quant_period=10, quant_per_channel=True)

    return train(model, budget, wrap=pulled)
