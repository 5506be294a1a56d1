"""The task that measures sensitivities, before it measures."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_compress.tasks.sensitivity import _warn_of_zeros


def test_a_model_that_is_pruned_already_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_zeros(model)
    with torch.no_grad():
        model[0].weight[:6] = 0
    with pytest.warns(UserWarning, match=r"60% of the weights are zero before anything is tried.*init_from="):
        _warn_of_zeros(model)
