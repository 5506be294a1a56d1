"""What a user imports."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import get_origin

import lightning.pytorch as pl
import pytest

import lightning_compress
import lightning_compress.callbacks

PACKAGES = (lightning_compress, lightning_compress.callbacks)  # the second lies in another folder
MODULES = sorted(
    module.name for package in PACKAGES for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


def loaded_after(code: str) -> set[str]:
    """Top-level packages that are loaded after some code ran in a new interpreter."""
    command = f"{code}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_and_its_configuration_loads_nothing_heavy() -> None:
    loaded = loaded_after("import lightning_compress, lightning_compress.conf")
    assert "lightning_compress" in loaded
    assert loaded.isdisjoint({"torch", "lightning", "pytorch_lightning", "numpy", "wandb", "hydra", "onnx"})


def test_the_names_that_are_listed_are_the_public_ones() -> None:
    assert [name for name in dir(lightning_compress) if not name.startswith("_")] == sorted(lightning_compress.__all__)
    assert all(hasattr(lightning_compress, name) for name in dir(lightning_compress))


def test_the_engine_loads_torch_and_not_lightning() -> None:
    loaded = loaded_after(
        "import lightning_compress.testing, lightning_compress.pruning, lightning_compress.quantization.convert"
    )
    assert "torch" in loaded
    assert loaded.isdisjoint({"lightning", "pytorch_lightning", "wandb", "hydra", "onnxruntime"})


def test_every_package_is_in_the_wheel() -> None:
    listed = (Path(__file__).parents[2] / "pyproject.toml").read_text().partition("packages = [")[2].partition("]")[0]
    packages = [m.name for m in pkgutil.walk_packages(lightning_compress.__path__, "lightning_compress.") if m.ispkg]
    assert {f'"{name}"' for name in packages} <= {line.strip(" ,") for line in listed.splitlines()}


def test_every_public_name_of_a_module_is_there_and_has_a_docstring() -> None:
    assert {"lightning_compress.callbacks.pruning", "lightning_compress.deploy.onnx"} < set(MODULES)
    for name in MODULES:
        module = import_module(name)
        assert module.__doc__, name
        public = getattr(module, "__all__", [])
        assert len(set(public)) == len(public), name
        for item in public:
            value = getattr(module, item)
            assert get_origin(value) or not callable(value) or value.__doc__, f"{name}.{item}"


def test_the_names_of_the_package_are_those_of_their_modules() -> None:
    schemes = import_module("lightning_compress.quantization.schemes")
    others = {"Phase", "convert", "load_from_checkpoint", "load_packed", "recipe", "save_pack_quantized", "save_packed"}
    assert set(lightning_compress.__all__) == others | set(schemes.__all__)
    assert all(getattr(lightning_compress, word) is getattr(schemes, word) for word in schemes.__all__)
    assert {"int8", "w8", "int4", "w4a8", "w2a8", "ternary", "log4", "exp4", "apot4", "codebook", "fp8"} <= set(
        schemes.__all__
    )
    assert lightning_compress.Phase is import_module("lightning_compress.phase").Phase
    assert lightning_compress.convert is import_module("lightning_compress.quantization.convert").convert
    assert (
        lightning_compress.load_from_checkpoint is import_module("lightning_compress.checkpoint").load_from_checkpoint
    )
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = lightning_compress.quantise


def test_the_version_is_that_of_the_distribution() -> None:
    assert lightning_compress.__version__ == version("lightning-compress")


def test_the_callbacks_are_exactly_these() -> None:
    expected = [
        "AccuracyGuard",
        "ChannelPruning",
        "Compressing",
        "CompressionReport",
        "Export",
        "FineTuning",
        "GradualPruning",
        "KnowledgeDistillation",
        "LayerPruning",
        "PostTrainingQuantization",
        "QuantizationAwareTraining",
        "Recipe",
        "RigL",
        "SET",
    ]
    assert sorted(lightning_compress.callbacks.__all__) == expected


@pytest.mark.parametrize("name", sorted({*lightning_compress.callbacks.__all__} - {"Compressing"}))
def test_a_callback_needs_no_argument_and_has_a_plain_state(name: str) -> None:
    callback = getattr(lightning_compress.callbacks, name)()
    assert isinstance(callback, pl.Callback)
    assert type(callback).__module__.startswith("lightning_compress.callbacks.")
    callback.load_state_dict(callback.state_dict())
    assert callback.state_key.startswith(name)
