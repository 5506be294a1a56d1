"""Train a model of pytorch-forecasting: its name, and a checkpoint to resume."""

import sys

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytorch_forecasting
from pytorch_forecasting import TimeSeriesDataSet

num = 30
frame = pd.DataFrame(
    {
        "value": np.concatenate([np.sin(np.arange(num) / (i + 2)) for i in range(8)]),
        "group": np.repeat([str(i) for i in range(8)], num),
        "time": np.tile(np.arange(num), 8),
    }
)
name, *checkpoint = sys.argv[1:]
series = TimeSeriesDataSet(
    frame,
    time_idx="time",
    target="value",
    group_ids=["group"],
    min_encoder_length=16,
    max_encoder_length=16,
    min_prediction_length=4,
    max_prediction_length=4,
    time_varying_unknown_reals=["value"],
)
model = getattr(pytorch_forecasting, name).from_dataset(series, learning_rate=1e-3)
trainer = pl.Trainer(max_epochs=6, accelerator="cpu", gradient_clip_val=0.1)
batches = series.to_dataloader(batch_size=16, num_workers=0)
trainer.fit(model, batches, batches, ckpt_path=checkpoint[0] if checkpoint else None, weights_only=False)
