"""The comparison of a file with its model, and timing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.deploy.files import words_of_caution, words_of_doubt
from lightning_compress.deploy.verify import Artifact, Comparison
from lightning_compress.forward import Inputs, replaced_forward

from .helpers import noise


class Passes(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


def compare(change: Callable[[Any], Any], *batches: Any) -> Comparison:
    """An identity compared with a runner that changes what it was given."""
    comparison = Comparison(Passes(), lambda inputs: change(inputs.args[0]))
    for batch in batches:
        comparison(batch)
    return comparison


def test_equal_outputs_agree_wholly() -> None:
    comparison = compare(lambda x: x.clone(), noise(5, 3), noise(2, 3))
    assert (comparison.max_abs_diff, comparison.agreement, comparison.num_calls) == (0.0, 1.0, 2)


def test_the_difference_is_the_largest_of_all_batches_and_outputs() -> None:
    comparison = compare(lambda x: {"a": x["a"], "b": x["b"] - 0.5}, {"a": noise(2, 3), "b": noise(2, 3)})
    assert comparison.max_abs_diff == pytest.approx(0.5)
    comparison({"a": noise(2, 3), "b": noise(2, 3)})
    assert comparison.max_abs_diff == pytest.approx(0.5)


def test_agreement_is_the_share_of_samples_with_the_same_largest_class() -> None:
    logits = torch.eye(4)[[0, 1, 2, 3, 0]]

    def change(x: Tensor) -> Tensor:
        return torch.cat([x[:3], x[3:].roll(1, -1)])

    assert compare(change, logits).agreement == pytest.approx(3 / 5)
    assert compare(change, logits, logits[:3]).agreement == pytest.approx(6 / 8)


def test_each_pixel_of_an_image_has_an_answer_of_its_own() -> None:
    """(N, C, H, W), with two classes: one of 12 pixels changes sides, and no column's largest pixel tells."""
    logits = torch.stack([torch.arange(12.0).view(3, 4), torch.full((3, 4), 5.5)])[None]

    def change(x: Tensor) -> Tensor:
        other = x.clone()
        other[0, 0, 1, 1] += 1  # from 5 to 6, over the other class
        return other

    assert compare(change, logits).agreement == pytest.approx(11 / 12)


def test_single_values_agree_within_one_percent_of_the_largest() -> None:
    assert compare(lambda x: x + 0.09, torch.tensor([[10.0], [1.0], [-5.0]])).agreement == 1.0
    assert compare(
        lambda x: x + torch.tensor([[0.0], [0.11], [0.0]]), torch.tensor([[10.0], [1.0], [-5.0]])
    ).agreement == (pytest.approx(2 / 3))
    assert compare(lambda x: x * 2, torch.tensor(3.0)).agreement == 0.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_output_that_is_not_finite_shows_in_the_difference(wrong: float) -> None:
    comparison = compare(lambda x: x.clone().index_fill_(1, torch.tensor(0), wrong), noise(4, 3), noise(4, 3))
    assert not math.isfinite(comparison.max_abs_diff)


def test_an_output_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare(lambda x: x[:1], (noise(2, 3), noise(2, 3)))


def test_integer_outputs_count_in_neither() -> None:
    comparison = compare(lambda x: x + 1, torch.arange(4))
    assert (comparison.max_abs_diff, comparison.agreement, comparison.num_calls) == (0.0, None, 1)


def test_a_comparison_stands_in_for_the_forward_and_gives_the_files_outputs() -> None:
    model, x = nn.Linear(3, 2), noise(4, 3)
    comparison = Comparison(model.requires_grad_(False), lambda inputs: model(*inputs.args) + 1)
    other = nn.Linear(3, 2)
    with replaced_forward(other, comparison):
        got = other(x)
    assert torch.equal(got, model(x) + 1)
    assert comparison.max_abs_diff == pytest.approx(1.0)


def test_both_compute_in_single_precision_where_the_step_casts() -> None:
    model = nn.Linear(8, 4)
    x = noise(5, 8)
    plain = model(x).detach()
    comparison = Comparison(model, lambda inputs: plain)
    with torch.autocast("cpu", torch.bfloat16):
        comparison(x)
    assert comparison.max_abs_diff == 0


def test_arguments_by_name_reach_the_model_and_the_file() -> None:
    seen: list[Inputs] = []
    comparison = Comparison(Passes(), lambda inputs: (seen.append(inputs), inputs.kwargs["x"])[1])
    comparison(x=noise(2, 3))
    assert torch.equal(seen[0].kwargs["x"], noise(2, 3))
    assert comparison.agreement == 1.0


def test_an_artifact_is_plain_values() -> None:
    artifact = Artifact("onnx", "onnxruntime", "a.onnx", 10, 5, 0.9, 1e-3, 1.0, {"1": 0.5}, {"1": 1.0})
    assert Artifact(**json.loads(json.dumps(artifact.to_dict()))) == artifact


def make_artifact(**fields: Any) -> Artifact:
    given = {"latency_ms": {"1": 0.5, "64": 9.0}, "latency_ms_float": {"1": 1.0, "64": 10.0}, "bytes_zstd_float": 9}
    given |= {"times_faster": {"1": [2.0, 1.9, 2.2], "64": [1.1, 0.9, 1.2]}}
    given |= {"integer_kernels": 3, "num_kernels": 3}
    return Artifact("onnx", "onnxruntime", "a/b.onnx", 10, 5, **{**given, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bytes_zstd_float": 5}, "b.onnx in onnxruntime is not smaller than its float twin: 5 bytes against 5"),
        (
            {"latency_ms": {"1": 1.5}, "times_faster": {"1": [0.7, 0.6, 0.9]}},
            "is slower than its float twin at batch 1: 1.5 ms against 1",
        ),
        ({"integer_kernels": 1}, "runs 2 of 3 operations with stored weights in float kernels"),
    ],
)
def test_what_one_would_not_expect_of_a_quantized_file_is_said(fields: dict[str, Any], said: str) -> None:
    assert words_of_caution(make_artifact()) == []
    (text,) = words_of_caution(make_artifact(**fields))
    assert said in text


def test_a_file_is_not_said_to_be_slower_by_less_than_the_times_vary() -> None:
    slower = {"latency_ms": {"1": 1.5}}
    assert words_of_caution(make_artifact(**slower, times_faster={"1": [0.7, 0.6, 1.1]})) == []
    assert words_of_caution(make_artifact(**slower, times_faster={})) == []  # how much it varies is not known


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"agreement": 0.9899}, "gives the model's answer on 98.99% of the samples; 99.00% is asked"),
        ({"max_rel_diff": 0.0201}, "differs from the model by 2.01% of its output's range; 2.00% is allowed"),
        ({"max_rel_diff": math.nan}, "differs from the model by nan%"),
        ({"overflowing": ["a", "b", "c", "d"], "cpu": "x86_64 AVX2"}, r"4 of its layers (a, b, c, ...) can saturate"),
        ({"overflowing": ["a"], "cpu": "x86_64 AVX2"}, "It was run on x86_64 AVX2. To ship to any x86 CPU train"),
    ],
)
def test_a_file_that_does_not_answer_like_the_model_is_doubted(fields: dict[str, Any], said: str) -> None:
    good = {"agreement": 0.99, "max_rel_diff": 0.02}
    assert words_of_doubt(make_artifact(**good), 0.99, 0.02) == []
    assert words_of_doubt(make_artifact(), 0.99, 0.02) == []  # nothing was compared
    (text,) = words_of_doubt(make_artifact(**{**good, **fields}), 0.99, 0.02)
    assert text.startswith("b.onnx in onnxruntime")
    assert said in text


def test_a_difference_is_a_share_of_the_range_of_its_own_output() -> None:
    batches = [(x, 100 * x) for x in (torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [4.0]]))]
    assert compare(lambda x: x).max_rel_diff is None
    assert compare(lambda x: (x[0] + 0.1, x[1] + 0.1), batches[0]).max_rel_diff == pytest.approx(0.1)
    both = compare(lambda x: (x[0] + 0.1, x[1] + 0.1), *batches)  # the range is that of all calls
    assert both.max_rel_diff == pytest.approx(0.1 / 4)
    assert both.max_abs_diff == pytest.approx(0.1, rel=1e-3)


def test_outputs_without_a_range_have_no_share_that_passes() -> None:
    assert compare(lambda x: x + 1e-6, torch.ones(2, 3)).max_rel_diff == math.inf
    assert compare(lambda x: x.clone(), torch.ones(2, 3)).max_rel_diff == 0.0
