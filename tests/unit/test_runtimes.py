"""A model as a file in every runtime: same answers, integer kernels, fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.deploy.files import Files, Pair, write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.size import weigh
from lightning_compress.forward import Inputs
from lightning_compress.quantization.convert import to_float

from .helpers import largest_difference, noise, quantize, randomized, run
from .test_graph import Tokens
from .test_placement import Residual

pytestmark = pytest.mark.runtimes
IMAGES = noise(8, 2, 8, 8)


def wide() -> nn.Module:
    """Layers of a size that weighs more than what a format says about itself."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 9)
    )


MODELS: dict[str, tuple[Any, Tensor]] = {
    "residual": (Residual, IMAGES),
    "tokens": (Tokens, noise(8, 5, 6)),
    "mlp": (wide, IMAGES),
}

# operations that a runtime is known to leave in float: Inductor one convolution of an image of 8 x 8
IN_FLOAT = {"torch": {"residual": 1}}


def files_of(name: str, key: str, folder: Path) -> tuple[nn.Module, Tensor, Files, Pair]:
    build, x = MODELS[name]
    torch.manual_seed(0)
    model = build().eval() if name == "mlp" else randomized(build()).eval()
    quantize(model, x)
    inputs, kind = Inputs((x,), {}), FORMATS[key]
    files = write_files(kind, model, inputs, folder / f"model{kind.suffix}", (1, 4))
    return model, x, files, Pair(kind, files, model, inputs)


@pytest.mark.parametrize("key", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_computes_in_integer_kernels_what_was_trained(name: str, key: str, tmp_path: Path) -> None:
    model, x, files, pair = files_of(name, key, tmp_path)
    expected, plain = run(model, x), run(to_float(model), x)
    got = pair.shipped(Inputs((x,), {}))
    assert got.shape == expected.shape
    assert largest_difference(got, expected) < 0.05 * float(expected.abs().max())
    twin = pair.runners[1][1](Inputs((x,), {}))
    torch.testing.assert_close(twin, plain, rtol=1e-3, atol=1e-3)
    before = x.clone()
    pair.latency(seconds=0.0)
    assert torch.equal(x, before)
    torch.testing.assert_close(pair.shipped(Inputs((x,), {})), got)
    integer, total = pair.integer_kernels()
    assert total == sum(p.dim() > 1 for p in model.parameters())
    assert total - integer <= IN_FLOAT.get(key, {}).get(name, 0)
    if name == "mlp":
        assert weigh(files.shipped[1])[1] < 0.35 * weigh(files.twin[1])[1]


@pytest.mark.parametrize("key", FORMATS)
def test_a_file_for_one_batch_size_lies_beside_that_for_another(key: str, tmp_path: Path) -> None:
    kind = FORMATS[key]
    names = {path.name for path in files_of("mlp", key, tmp_path)[2].shipped.values()}
    one = {f"model{kind.suffix}"}
    assert names == (one if kind.dynamic_batch else one | {f"model_batch4{kind.suffix}"})


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Strange(nn.Module):
    """An operation that runtimes for phones have no kernel for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x.flatten(2))


@pytest.mark.parametrize(("build", "key"), [(Branch, "executorch"), (Branch, "litert"), (Strange, "litert")])
def test_what_a_runtime_cannot_take_is_an_exception_and_no_crash(
    build: type[nn.Module], key: str, tmp_path: Path
) -> None:
    kind = FORMATS[key]
    with pytest.raises(Exception, match=r"\w+"):
        kind.export(build().eval(), Inputs((IMAGES,), {}), tmp_path / f"model{kind.suffix}")
