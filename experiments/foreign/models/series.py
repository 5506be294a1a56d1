"""Forecasting: pytorch-forecasting's own LightningModules, and nets of neuralforecast and transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .text import net_of
from .wrapped import BATCH_SIZE, NUM_SAMPLES, Made, by_keywords, pairs

__all__ = ["MODELS"]

_PAST = 16
_FUTURE = 4


def _series(**fields: Any) -> Any:
    """Eight series of 30 steps each."""
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    num = 30
    drawn = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "value": np.concatenate(
                [np.sin(np.arange(num) / (i + 2)) + 0.1 * drawn.standard_normal(num) for i in range(8)]
            ),
            "group": np.repeat([str(i) for i in range(8)], num),
            "time": np.tile(np.arange(num), 8),
        }
    )
    return TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["group"],
        min_encoder_length=_PAST,
        max_encoder_length=_PAST,
        min_prediction_length=_FUTURE,
        max_prediction_length=_FUTURE,
        time_varying_unknown_reals=["value"],
        **fields,
    )


def _forecasting(name: str, data: dict[str, Any], fields: dict[str, Any]) -> Made:
    import pytorch_forecasting

    found = _series(**data)
    module = getattr(pytorch_forecasting, name).from_dataset(found, learning_rate=1e-3, log_interval=-1, **fields)
    train, val = (found.to_dataloader(train=False, batch_size=BATCH_SIZE, num_workers=0) for _ in range(2))
    return Made(module, train, val, {})


class Windows(nn.Module):
    """A net of neuralforecast on windows of one series."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The future of each window."""
        nothing = dict.fromkeys(("hist_exog", "futr_exog", "stat_exog"))
        return self.net({"insample_y": x, "insample_mask": torch.ones_like(x), **nothing})


def _neuralforecast(name: str, **fields: Any) -> Made:
    from neuralforecast import models

    net = getattr(models, name)(h=_FUTURE, input_size=_PAST, max_steps=1, **fields)
    x = torch.randn(NUM_SAMPLES, _PAST, 1)
    y = torch.randn(NUM_SAMPLES, _FUTURE, 1)
    # its forward is used as a net: its training loop wants data frames
    return pairs(Windows(net), x, y, _near)


def _near(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.reshape(target.shape), target)


def _patches() -> Made:
    net = net_of(
        "PatchTSTConfig",
        "PatchTSTForPrediction",
        num_input_channels=2,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        d_model=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=128,
        prediction_length=_FUTURE,
    )
    return by_keywords(
        net, {"past_values": torch.randn(NUM_SAMPLES, 32, 2), "future_values": torch.randn(NUM_SAMPLES, _FUTURE, 2)}
    )


_KNOWN = {"time_varying_known_reals": ["time"]}

MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "TFT": (
        "pytorch-forecasting",
        partial(
            _forecasting,
            "TemporalFusionTransformer",
            _KNOWN | {"static_categoricals": ["group"]},
            {"hidden_size": 32, "hidden_continuous_size": 16, "attention_head_size": 4},
        ),
    ),
    "N-BEATS": (
        "pytorch-forecasting",
        partial(_forecasting, "NBeats", {}, {"widths": [64, 64], "num_blocks": [1, 1], "num_block_layers": [2, 2]}),
    ),
    "DeepAR": (
        "pytorch-forecasting",
        partial(_forecasting, "DeepAR", _KNOWN, {"hidden_size": 32, "rnn_layers": 2}),
    ),
    "NHITS": ("neuralforecast", partial(_neuralforecast, "NHITS", mlp_units=3 * [[64, 64]])),
    "TCN": (
        "neuralforecast",
        partial(_neuralforecast, "TCN", encoder_hidden_size=32, context_size=4, decoder_hidden_size=32),
    ),
    "PatchTST": ("transformers", _patches),
}
