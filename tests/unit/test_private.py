"""What we use of other packages that is not public: in one list, which names the version that no longer has it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("lightning_compress", "callbacks", "hydra_plugins")
PRIVATE = {
    "executorch.exir._serialize._flatbuffer": ["_flatc_decompile"],
    "executorch.exir._serialize._program": ["deserialize_pte_binary"],
    "hydra._internal.core_plugins.importlib_resources_config_source": ["ImportlibResourcesConfigSource"],
    "lightning.fabric.utilities.optimizer": ["_optimizers_to_device"],
    "lightning.pytorch.strategies.launchers": ["_MultiProcessingLauncher"],
    "torch._inductor": ["config"],
    "torch._inductor.graph": ["GraphLowering"],
    "torch.ao.quantization.fx._decomposed": [],
    "torch.nn.modules.batchnorm": ["_BatchNorm", "_NormBase"],
    "torch.nn.modules.conv": ["_ConvNd"],
    "torch.nn.modules.transformer": ["_detect_is_causal_mask"],
    "torch.onnx._internal.exporter._registration": ["ONNXRegistry"],
    "torch.utils._python_dispatch": ["TorchDispatchMode", "is_traceable_wrapper_subclass"],
    "torch.utils._pytree": ["tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"],
    "wandb.proto.wandb_internal_pb2": ["Record"],
}
DISTRIBUTIONS = {"hydra": "hydra-core"}


def in_use(source: Path) -> Iterator[tuple[str, str]]:
    """The private modules that a file imports, or names in a text, and the names that it takes from them."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                module = f"{node.module}.{alias.name}" if node.module == "wandb.proto" else node.module
                yield module, "" if module.endswith(alias.name) else alias.name
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"(torch|hydra|wandb)(\.\w+)*\._\w+(\.\w+)*", f"{node.value}"
        ):
            # a module to import, or what is patched in one
            module, _, name = node.value.rpartition(".")
            yield (node.value, "") if is_module(node.value) else (module, name)


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def is_private(module: str, name: str) -> bool:
    words = [*module.split("."), name]
    return module.startswith("wandb.proto") or any(re.match("_[^_]", word) for word in words)


def test_every_private_use_is_in_the_list() -> None:
    found: dict[str, set[str]] = {}
    for source in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        for module, name in in_use(source):
            if is_private(module, name) and not module.startswith("lightning_compress"):
                found.setdefault(module, set()).update({name} - {""})
    assert set(found) == set(PRIVATE)
    assert {module: names - set(PRIVATE[module]) for module, names in found.items()} == {m: set() for m in found}


def modules() -> list[Any]:
    """The list; the packages of runtimes are tested with these."""
    marks = {"executorch": [pytest.mark.runtimes]}
    return [pytest.param(module, marks=marks.get(module.partition(".")[0], [])) for module in PRIVATE]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", modules())
def test_the_installed_version_has_it(module: str) -> None:
    package = module.partition(".")[0]
    here = f"{package} {version(DISTRIBUTIONS.get(package, package))}"
    try:
        held = import_module(module)
    except ModuleNotFoundError as error:
        pytest.fail(f"{here} has no module {module}, which we import: {error}")
    assert [name for name in PRIVATE[module] if not hasattr(held, name)] == [], f"{here}: {module} lacks these"
