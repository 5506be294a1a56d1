"""The forward of a module, recorded and replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.forward import (
    ForwardOnly,
    Inputs,
    record_inputs,
    replaced_forward,
    run_model,
    with_batch,
)

from .helpers import noise


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.num_calls = nn.Linear(3, 2), 0

    def forward(self, x: Tensor, *, scale: Any = 1.0) -> Tensor:
        self.num_calls += 1
        return self.fc(x) * scale

    def step(self, batch: Tensor) -> Tensor:
        return self(batch, scale=torch.full((len(batch), 1), 2.0)).sum()


def test_the_inputs_of_the_first_call_are_recorded_and_the_call_does_not_run() -> None:
    model, batch = Model(), noise(4, 3)
    reached: list[str] = []

    def step() -> None:
        model.step(batch)
        reached.append("end")

    inputs = record_inputs(model, step)
    assert model.num_calls == 0
    assert not reached
    assert torch.equal(inputs.args[0], batch)
    assert torch.equal(inputs.kwargs["scale"], torch.full((4, 1), 2.0))
    batch.zero_()
    assert inputs.args[0].any()
    model.step(batch)
    assert model.num_calls == 1


def test_without_a_call_nothing_is_recorded() -> None:
    assert record_inputs(Model(), lambda: None) is None


def test_an_error_of_the_users_own_code_is_not_swallowed() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError):
        record_inputs(model, lambda: 1 / 0)
    assert "forward" not in model.__dict__


def test_a_forward_is_replaced_inside_the_context_only_and_nests() -> None:
    model, x = Model(), noise(2, 3)
    expected = model(x)
    with replaced_forward(model, lambda x: "outer"):
        with replaced_forward(model, lambda x: "inner"):
            assert model(x) == "inner"
        assert model(x) == "outer"
    assert torch.equal(model(x), expected)
    assert "forward" not in model.__dict__


def test_a_forward_comes_back_after_an_error() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError), replaced_forward(model, lambda x: 1 / x):
        model(0)
    assert model(noise(2, 3)).shape == (2, 2)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 64])
def test_a_batch_is_repeated_or_cut_along_its_first_axis(size: int) -> None:
    x = noise(4, 3)
    inputs = Inputs((x, 5, noise(3), torch.tensor(2.0)), {"mask": {"deep": x[:, 0] > 0}})
    got = with_batch(inputs, size)
    assert torch.equal(got.args[0], torch.stack([x[i % 4] for i in range(size)]))
    assert torch.equal(got.kwargs["mask"]["deep"], got.args[0][:, 0] > 0)
    assert got.args[1] == 5
    assert torch.equal(got.args[2], noise(3))
    assert got.args[3].shape == ()
    assert (got.batch_size, inputs.batch_size) == (size, 4)


def test_the_batch_size_is_that_of_the_first_tensor_and_one_without_any() -> None:
    assert Inputs((3, torch.tensor(1.0), noise(5, 2)), {}).batch_size == 5
    assert Inputs((), {"x": noise(6, 2)}).batch_size == 6
    assert Inputs((3, "text"), {}).batch_size == 1


def test_forward_only_runs_the_forward_and_holds_the_same_parameters() -> None:
    model, x = Model(), noise(2, 3)
    alone = ForwardOnly(model, Inputs((x,), {"scale": 3.0}))
    assert torch.equal(alone(2 * x), model(2 * x, scale=3.0))
    assert [id(p) for p in alone.parameters()] == [id(p) for p in model.parameters()]


def test_run_model_passes_all_arguments_and_makes_no_gradient() -> None:
    model, x = Model(), noise(2, 3)
    got = run_model(model, Inputs((x,), {"scale": 2.0}))
    assert torch.equal(got, model(x, scale=2.0))
    assert not got.requires_grad
