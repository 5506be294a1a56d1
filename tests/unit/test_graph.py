"""The graph of a model, in the form that integer runtimes recognize."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_compress import convert
from lightning_compress.deploy.graph import capture, quantize_inputs_at_run_time, quantize_outputs
from lightning_compress.deploy.runner import in_batches, pieces_of
from lightning_compress.forward import Inputs

from .helpers import largest_difference, noise, quantize, randomized, run
from .test_convert import IMAGES
from .test_placement import Residual


class Tokens(nn.Module):
    """Attention, a norm, and a head that reads one token."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(6, 18), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + y)[:, 0])


def operations(graph: GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


CASES = {"residual": (Residual, IMAGES), "tokens": (Tokens, noise(4, 5, 6))}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_graph_computes_the_same(name: str, dynamic: bool) -> None:
    build, x = CASES[name]
    model = randomized(build())
    quantize(model, x)
    converted = convert(model, "int8")
    graph = capture(converted, Inputs((x,), {}), dynamic)
    assert largest_difference(run(graph, x), run(converted, x)) < 1e-5


@every_case
def test_each_dequantize_has_one_reader_and_the_float_weights_are_gone(name: str) -> None:
    build, x = CASES[name]
    model = randomized(build())
    quantize(model, x)
    graph = capture(convert(model), Inputs((x,), {}))
    found = [node for node in graph.graph.nodes if "dequantize_per_tensor" in str(node.target)]
    assert found
    assert all(len(node.users) == 1 for node in found)
    assert not [p for p in graph.parameters() if p.dim() > 1]


def test_a_linear_layer_reads_codes_through_what_reshapes() -> None:
    x = CASES["tokens"][1]
    model = randomized(Tokens())
    quantize(model, x)
    graph = capture(convert(model), Inputs((x,), {}))
    linear = [node for node in graph.graph.nodes if str(node.target) == "aten.linear.default"]
    assert len(linear) == 2
    assert all("dequantize_per_tensor" in str(node.args[0].target) for node in linear)


@every_case
def test_outputs_in_float_are_quantized_with_the_range_of_samples(name: str) -> None:
    build, x = CASES[name]
    model = randomized(build())
    quantize(model, x)
    graph = capture(convert(model, "int8"), Inputs((x,), {}))
    before = run(graph, x)
    quantize_outputs(graph, [(x,)])
    step = 1.1 * float(before.max() - before.min()) / 255
    difference = largest_difference(run(graph, x), before)
    assert 0 < difference < 20 * step


def test_inputs_of_a_float_output_are_quantized_at_run_time() -> None:
    model = randomized(Residual())
    quantize(model, IMAGES)
    graph = capture(convert(model, "int8"), Inputs((IMAGES,), {}))
    before = run(graph, IMAGES)
    quantize_inputs_at_run_time(graph)
    assert operations(graph)["quantized_decomposed.choose_qparams.tensor"] == 1  # the last layer
    assert largest_difference(run(graph, IMAGES), before) < 0.05 * float(before.abs().max())


@pytest.mark.parametrize(("num", "size"), [(5, 2), (4, 4), (1, 3), (3, 1)])
def test_batches_of_one_size_give_the_whole(num: int, size: int) -> None:
    x = noise(num, 3)
    sizes = [piece.batch_size for piece in pieces_of(Inputs((x,), {}), size)]
    assert sizes == [size] * -(-num // size)
    (y,) = in_batches(lambda inputs: [inputs.args[0] * 2], Inputs((x,), {}), size)
    assert torch.equal(y, x * 2)
