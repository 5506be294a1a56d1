"""Train an estimator of gluonts: its name, and a checkpoint to resume."""

import sys

import numpy as np
import pandas as pd
from gluonts import torch as estimators
from gluonts.dataset.pandas import PandasDataset

months = pd.period_range("2020-01", periods=100, freq="M")
series = {str(i): pd.Series(np.sin(np.arange(100) / (i + 2)).astype("float32"), months) for i in range(8)}
name, *checkpoint = sys.argv[1:]
options: dict[str, object] = {"freq": "M"} if name == "DeepAREstimator" else {}
options |= {"patch_len": 4} if name == "PatchTSTEstimator" else {}
estimator = getattr(estimators, name)(
    prediction_length=6,
    num_batches_per_epoch=10,
    trainer_kwargs={"max_epochs": 6, "accelerator": "cpu"},
    **options,
)
estimator.train(PandasDataset(series), ckpt_path=checkpoint[0] if checkpoint else None)
