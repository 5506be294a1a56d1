"""What README, method cards and guides show is what runs: their Python as written, their commands as they compose.

The Python blocks of a document run one after the other, in an empty folder, and share their names. What a reader brings
along stands in ``names``, under the names that the documents give it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.bench.__main__ import parse
from lightning_compress.cli import TASKS
from lightning_compress.deploy.files import write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.forward import Inputs
from lightning_compress.recipes import recipe
from lightning_compress.usage import expand

from .unit.helpers import quantize

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.glob("docs/*.md") if path.name != "foreign.md")  # which a command writes
CARDS = [*sorted(ROOT.glob("docs/methods/*.md")), *sorted(ROOT.glob("docs/guides/*.md"))]
DOCUMENTS = [ROOT / "README.md", *PAGES, *CARDS]
# reads the files of every runtime
IN_RUNTIMES = "docs/guides/deployment.md"


class MyModule(pl.LightningModule):
    """A small classifier of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.layer3 = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer3(self.stem(x).relu()).relu().flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 1, 8, 8), torch.arange(24) % 3), batch_size=8)


class MyData(pl.LightningDataModule):
    """Random images."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return loader()


def names() -> dict[str, Any]:
    """What a reader of the documents has already."""
    return {
        "MyModule": MyModule,
        "MyData": MyData,
        "model": MyModule(),
        "larger_network": MyModule(),
        "calibration_loader": loader(),
        "test_loader": loader(),
        "inputs": torch.randn(8, 1, 8, 8),
        "outputs": torch.randn(8, 3),
        "loss": torch.tensor(1.0),
        "images": torch.randn(8, 1, 8, 8),
        "image": torch.randn(1, 1, 8, 8),
    }


def blocks(document: Path) -> Iterator[tuple[int, str, str]]:
    """Line, language and text of the fenced blocks."""
    text = document.read_text()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start()) + 1, found[1], found[2]


def run_python(document: Path, given: dict[str, Any]) -> None:
    for line, language, text in blocks(document):
        if language == "python":
            # an error names the document and the line in it
            exec(compile("\n" * line + text, str(document), "exec"), given)


def with_python() -> list[Any]:
    shown = [document for document in DOCUMENTS if any(language == "python" for _, language, _ in blocks(document))]
    return [str(document.relative_to(ROOT)) for document in shown]


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("document", [name for name in with_python() if name != IN_RUNTIMES])
def test_python_runs_as_written(document: str) -> None:
    run_python(ROOT / document, names())


@pytest.mark.runtimes
@pytest.mark.usefixtures("_folder")
def test_python_runs_as_written_in_every_runtime() -> None:
    given = names()
    model = given["model"].eval()
    trainer = pl.Trainer(max_steps=0, logger=False, enable_checkpointing=False)
    trainer.fit(MyModule(), MyData())
    trainer.save_checkpoint("model.ckpt")
    quantize(model, given["images"])
    for name in ("onnx", "executorch", "litert", "torch"):
        kind = FORMATS[name]
        write_files(kind, model, Inputs((given["images"],), {}), Path(f"deploy/model{kind.suffix}"), (1,))
    run_python(ROOT / IN_RUNTIMES, given)
    assert given["logits"].shape == (8, 3)


def yaml_recipes() -> list[str]:
    found = [(document, text) for document in DOCUMENTS for _, language, text in blocks(document) if language == "yaml"]
    return [f"# {document.name}\n{text}" for document, text in found]


@pytest.mark.parametrize("text", yaml_recipes())
def test_recipe_is_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "compress.yaml"
    path.write_text(text)
    assert recipe(path)


def commands(program: str) -> list[str]:
    """Lines of blocks, code inside sentences, and the headers of configuration files that start with a program."""
    found = set()
    for document in DOCUMENTS:
        for _, language, text in blocks(document):
            if not language:
                found.update(re.findall(rf"^{program} [^#\n]+", text, re.MULTILINE))
        prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        found.update(" ".join(code.split()) for code in re.findall(rf"`({program} [^`]+)`", prose))
    for header in ROOT.glob("conf/**/*.yaml"):
        found.update(re.findall(rf"^# ({program} .+)", header.read_text(), re.MULTILINE))
    return sorted(line.strip() for line in found)


# what prints a page and composes nothing has its own tests
@pytest.mark.parametrize("command", [line for line in commands("lightning-compress") if " --" not in line])
def test_command_composes(command: str) -> None:
    from hydra import compose, initialize_config_module
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    # three dots stand for what the reader has
    _, *words = [word for word in shlex.split(command) if not word.endswith("...")]
    overrides = [word for word in expand(words) if word != "-m"]
    parsed = OverridesParser.create().parse_overrides(overrides)
    ((*jobs,),) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert len(jobs) == 1 or "-m" in words
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        for job in jobs:
            assert compose("config", job, return_hydra_config=True).task in TASKS


@pytest.mark.parametrize("command", commands("python -m experiments.bench"))
def test_benchmark_takes_its_options(command: str) -> None:
    assert parse(shlex.split(command)[3:])
