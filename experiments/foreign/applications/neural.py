"""Train a model of neuralforecast, whose Trainer is one of the package pytorch_lightning."""

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS

frame = pd.DataFrame({"unique_id": "a", "ds": pd.date_range("2020", periods=200), "y": np.sin(np.arange(200) / 5)})
NeuralForecast([NHITS(h=4, input_size=16, max_steps=20, accelerator="cpu")], freq="D").fit(frame)
