"""Applications that know nothing of the package, under LIGHTNING_COMPRESS; recipes in scripts and in LightningCLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_compress
from lightning_compress.callbacks import CompressionReport, GradualPruning, QuantizationAwareTraining, Recipe
from lightning_compress.environment import callbacks, of_pytorch_lightning, without_variable
from lightning_compress.recipes import recipes

from ..harness import make_module, make_trainer
from ..processes import in_a_process

APPLICATION = """
import sys
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel


class Net(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = __import__("torch").nn.Linear(32, 2)

    def validation_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("val_loss", loss)


pl.seed_everything(0)
saving = ModelCheckpoint(save_last=True, every_n_epochs=1, save_top_k=-1)
trainer = pl.Trainer(max_epochs=4, limit_train_batches=10, limit_val_batches=2, enable_progress_bar=False,
                     callbacks=[saving], accelerator="cpu", default_root_dir="runs")
model = Net()
trainer.fit(model, ckpt_path=sys.argv[1] if len(sys.argv) > 1 else None)
print("zeros", int((model.layer.weight == 0).sum()), "callbacks", [type(c).__name__ for c in trainer.callbacks])
"""
PRUNE = "magnitude prune.sparsity=.75 prune.phase.begin=0 prune.phase.end=.9 export=null"


def run(folder: Path, variable: str | None, *arguments: str, ok: bool = True) -> str:
    (folder / "application.py").write_text(APPLICATION)
    variables = {} if variable is None else {"LIGHTNING_COMPRESS": variable}
    kept = {key: value for key, value in os.environ.items() if key != "LIGHTNING_COMPRESS"}
    text, code = in_a_process(["application.py", *arguments], folder, {**kept, **variables})
    assert (code == 0) == ok, text[-4000:]
    return text


def test_an_application_is_pruned_and_resumed_without_a_line_of_its_own(tmp_path: Path) -> None:
    text = run(tmp_path, PRUNE)
    assert f"LIGHTNING_COMPRESS={PRUNE!r} adds GradualPruning, CompressionReport to the Trainer." in text
    assert "zeros 48 " in text
    (report,) = (tmp_path / "runs").rglob("report.json")
    assert json.loads(report.read_text())["compressed"]["sparsity"] == 0.75
    last = next((tmp_path / "runs").rglob("last.ckpt"))
    weights = torch.load(last, weights_only=True)["state_dict"]
    (early,) = (tmp_path / "runs").rglob("epoch=1-*.ckpt")
    resumed = run(tmp_path, PRUNE, str(early))
    assert "zeros 48 " in resumed
    others = [path for path in (tmp_path / "runs").rglob("last*.ckpt") if path != last]
    again = torch.load(max(others, key=lambda path: path.stat().st_mtime), weights_only=True)["state_dict"]
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_nothing_is_imported_where_it_is_not_set(tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(APPLICATION)
    kept = {key: value for key, value in os.environ.items() if key != "LIGHTNING_COMPRESS"}
    ours = "sorted(name for name in sys.modules if name.partition('.')[0] == 'lightning_compress')"
    command = [sys.executable, "-c", f"import runpy, sys; runpy.run_path('application.py'); print({ours})"]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, check=True)
    assert "zeros 0 " in done.stdout
    assert done.stdout.splitlines()[-1] == "['lightning_compress', 'lightning_compress.environment']"


def test_a_wrong_recipe_ends_the_run_with_the_list(tmp_path: Path) -> None:
    text = run(tmp_path, "prune_int", ok=False)
    assert (
        "LIGHTNING_COMPRESS='prune_int': recipe name='prune_int' is none of those here: bert, channels, distill" in text
    )
    assert "Did you mean 'prune_int8'?" in text
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_trainer_that_compresses_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_COMPRESS", "prune_int8")
    pruning = GradualPruning(0.5)
    trainer = make_trainer(tmp_path, callbacks=[pruning], max_epochs=2)
    trainer.fit(make_module("mlp"))
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds.count(GradualPruning) == 1
    assert QuantizationAwareTraining not in kinds


def test_a_second_fit_adds_nothing_again(tmp_path: Path) -> None:
    report = CompressionReport(show=False)
    recipe = Recipe("magnitude", ["prune.phase.begin=0", "prune.phase.end=0.5", "export=null"])
    trainer = make_trainer(tmp_path, callbacks=[recipe, report], max_epochs=2)
    module = make_module("mlp")
    trainer.fit(module)
    trainer.validate(module)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module)
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds.count(GradualPruning) == kinds.count(CompressionReport) == 1
    assert report in trainer.callbacks  # the user's, and not that of the recipe
    assert sum(int((p == 0).sum()) for p in module.parameters()) > 0.85 * sum(p.numel() for p in module.parameters())


def test_trainers_of_our_own_are_not_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_COMPRESS", "magnitude")
    (found,) = callbacks()
    assert isinstance(found, Recipe)
    with without_variable():
        assert callbacks() == []
    with pytest.raises(ValueError, match="the package pytorch_lightning"):
        of_pytorch_lightning()
    monkeypatch.setenv("LIGHTNING_COMPRESS", " ")
    assert callbacks() == of_pytorch_lightning() == []


def test_processes_that_are_launched_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[Recipe("magnitude")], strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match="Accepted are strategies that launch none"):
        trainer.fit(make_module("mlp"))


def test_one_file_for_a_script_and_the_command_line(tmp_path: Path) -> None:
    content = {
        "prune": {"_target_": "lightning_compress.callbacks.GradualPruning", "sparsity": 0.5},
        "report": {"_target_": "lightning_compress.callbacks.CompressionReport", "dirpath": str(tmp_path)},
        "none": None,
    }
    (tmp_path / "compress.yaml").write_text(yaml.safe_dump(content))
    pruning, report = lightning_compress.recipe(tmp_path / "compress.yaml", "compression.prune.sparsity=0.6")
    assert pruning.final == 0.6
    assert isinstance(report, CompressionReport)
    script = tmp_path / "cli.py"
    script.write_text(
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel, BoringDataModule\n"
        "import lightning_compress.callbacks\n"
        "LightningCLI(BoringModel, BoringDataModule)\n"
    )
    options = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    options += ["--trainer.callbacks+=lightning_compress.callbacks.Recipe"]
    options += [f"--trainer.callbacks.recipe={tmp_path / 'compress.yaml'}"]
    options += ["--trainer.callbacks.overrides=[prune.every=2]"]
    text, code = in_a_process(["cli.py", "fit", *options], tmp_path, dict(os.environ))
    assert code == 0, text[-3000:]
    assert "adds GradualPruning, CompressionReport to the Trainer." in text
    assert json.loads((tmp_path / "report.json").read_text())["compressed"]["sparsity"] == 0.5


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_made(name: str) -> None:
    assert len(lightning_compress.recipe(name)) >= 2


WRONG = {
    "prun.sparsity=3": "prun={'sparsity': 3} is no callback.*Did you mean 'prune'",
    "prune.sparsit=3": "GradualPruning has no such argument.*Did you mean 'sparsity'",
    "prune.phase.begn=3": "Phase has no such argument. Accepted are begin, end, unit. Name one. Did you mean 'begin'",
    "prune.sparsity=3": "prune: ValueError: GradualPruning.sparsity=3: accepted is a share",
    "prune": "overrides='prune' changes nothing",
    "prune=[1": "has no value of YAML",
    "prune._target_=nowhere.Class": "cannot be imported",
    "prune.sparsity=${other}": "Interpolation key 'other' not found",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_change_is_refused_in_words(override: str) -> None:
    with pytest.raises(ValueError, match=WRONG[override]):
        lightning_compress.recipe("prune_int8", override)


@pytest.mark.parametrize("text", ["- 1", "a: [", "defaults: [a]", "just words"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.yaml"):
        lightning_compress.recipe(tmp_path / "wrong.yaml")
    with pytest.raises(ValueError, match="there is no such file"):
        lightning_compress.recipe(tmp_path / "none.yaml")
