"""The commands that the README shows, really run: our own, other people's, sweeps; W&B read back."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lightning_compress import cli
from lightning_compress.callbacks.verdict import TargetMissed
from lightning_compress.deploy.size import weigh
from lightning_compress.deploy.tflm import Runner
from lightning_compress.offline_runs import offline_runs
from lightning_compress.recipes import recipes as names_of_recipes

from ..nightly import nightly, some
from ..processes import in_a_process

ROOT = Path(__file__).parents[2]
FAST = ["trainer.max_epochs=2", "+trainer.limit_train_batches=15", "+trainer.limit_val_batches=2"]


def run(
    *command: str,
    cwd: Path = ROOT,
    ok: bool = True,
    warned: bool = False,
    environment: dict[str, str] | None = None,
) -> str:
    """Output of a command of this environment, with its warnings or without."""
    warnings = {} if warned else {"PYTHONWARNINGS": "ignore"}
    variables = {**os.environ, **warnings, "COLUMNS": "80", "PYTHONPATH": str(ROOT), **(environment or {})}
    text, code = in_a_process(list(command), cwd, variables)
    assert (code == 0) == ok, text[-4000:]
    return text


def command(*overrides: str, **options: Any) -> str:
    return run("-m", "lightning_compress.cli", *overrides, **options)


def composed(*overrides: str, **options: Any) -> DictConfig:
    """The configuration of our command, composed in this process."""
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        return compose("config", list(overrides), **options)


def in_process(*overrides: str) -> Any:
    """What our command does, without a new interpreter."""
    return cli._main(composed(*overrides))


# What others read out of report.json: keys may be added, and none of these may go.
REPORT_KEYS = {
    "artifacts",
    "compressed",
    "control",
    "dense",
    "latency_ms_pytorch",
    "latency_ms_pytorch_quartiles",
    "layers",
    "origin",
    "metric",
    "packed",
    "phases",
    "seconds",
    "steps",
    "targets",
    "validation_samples",
    "warnings",
}
ARTIFACT_KEYS = {
    "agreement",
    "arena_bytes",
    "batch",
    "bytes",
    "bytes_zstd",
    "bytes_zstd_float",
    "cpu",
    "deployed_minus_trained",
    "float_kernels",
    "format",
    "inputs",
    "integer_kernels",
    "integers",
    "judged",
    "latency_ms",
    "latency_ms_float",
    "latency_ms_float_quartiles",
    "latency_ms_quartiles",
    "left_out",
    "max_abs_diff",
    "max_rel_diff",
    "metric",
    "num_kernels",
    "overflowing",
    "path",
    "runtime",
    "times_faster",
    "warnings",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo, shortened."""
    folder = tmp_path_factory.mktemp("demo")
    text = command("experiment=mnist_prune_int8", *FAST, f"hydra.run.dir={folder}", warned=True)
    assert "did not take" not in text, text[-4000:]
    assert "is not whole" not in text, text[-4000:]
    return folder, text


@pytest.mark.xdist_group("demo")
def test_demo_writes_what_the_contract_names(demo: tuple[Path, str]) -> None:
    folder, text = demo
    reports = ("report.json", "report.html", "MODEL_CARD.md")
    for name in (*reports, "deploy/model.onnx", "checkpoints/last.ckpt", "csv/metrics.csv"):
        assert (folder / name).is_file(), name
    assert len(offline_runs(folder)) == 1
    assert text.count("logged offline") == 1
    assert "what compression bought" in text
    assert str(folder / "report.html") in text


@pytest.mark.xdist_group("demo")
def test_report_has_the_contract_keys_and_true_values(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    report = json.loads((folder / "report.json").read_text())
    assert set(report) == REPORT_KEYS
    totals = {"metric", "num_params", "num_nonzero", "sparsity", "macs", "bytes", "bytes_zstd"}
    for key in ("dense", "control", "compressed"):
        assert set(report[key]) == totals
        assert all(value is not None for value in report[key].values())
    assert report["metric"] == "val_acc"
    layer = {"name", "type", "num_params", "sparsity", "weight_bits", "input_bits", "macs", "bytes"}
    assert all(set(row) == layer for row in report["layers"])
    assert {row["weight_bits"] for row in report["layers"]} == {row["input_bits"] for row in report["layers"]} == {8}
    (artifact,) = report["artifacts"]
    assert set(artifact) == ARTIFACT_KEYS
    assert set(artifact["latency_ms"]) == set(artifact["latency_ms_float"]) == {"1", "64"}
    for key in ("latency_ms", "latency_ms_float"):
        for size, (low, high) in artifact[f"{key}_quartiles"].items():
            assert low <= artifact[key][size] <= high
    assert report["phases"] == ["dense", "prune", "fine-tune", "calibrate", "quantize"]
    assert 0 < report["steps"]["dense"] < report["steps"]["control"] == report["steps"]["compressed"]
    assert artifact["bytes"] == (folder / "deploy" / "model.onnx").stat().st_size
    assert artifact["agreement"] >= 0.99
    assert report["compressed"]["sparsity"] >= 0.9
    assert report["compressed"]["num_params"] == report["dense"]["num_params"]
    assert set(report["seconds"]) == {"fit", "overhead"}
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 4
    assert report["packed"]["bytes"] == (folder / "packed.safetensors").stat().st_size < artifact["bytes"]
    assert "viewport" in html


@pytest.mark.xdist_group("demo")
def test_offline_run_holds_config_history_summary_table_and_images(demo: tuple[Path, str]) -> None:
    (run_,) = offline_runs(demo[0])
    assert run_.config["seed"] == 0
    assert run_.config["compression"]["prune"]["sparsity"] == 0.9
    keys = {key for row in run_.history for key in row}
    assert {"compress/sparsity", "compress/phase", "compress/bytes", "val_acc", "train_loss"} <= keys
    live = [row["compress/sparsity"] for row in run_.history if "compress/sparsity" in row]
    assert live == sorted(live)
    assert live[-1] >= 0.9
    assert run_.summary["compress/final_sparsity"] >= 0.9
    metadata = run_.artifacts[f"model-{run_.run_id}-onnx"]  # beside those of the tables
    assert metadata["bytes"] == (demo[0] / "deploy" / "model.onnx").stat().st_size
    assert run_.artifacts[metadata["made_from"]]["bytes"] == (demo[0] / "packed.safetensors").stat().st_size
    (table,) = demo[0].rglob("files/media/table/compress/over_time*.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == ["step", "layer", "sparsity", "weight_bits"]
    layers = len({row[1] for row in rows["data"]})
    assert {row[3] for row in rows["data"][:layers]} == {32}
    assert {row[3] for row in rows["data"][-layers:]} == {8}
    pictures = {path.name.split("_")[0] for path in demo[0].rglob("files/media/images/compress/*.png")}
    assert pictures == {"metric", "sparsity", "bits", "weights"}
    assert run_.name.partition(" ")[0] == run_.group == "mnist_prune_int8"
    assert run_.summary["compress/file_bytes"] == metadata["bytes"]
    assert run_.summary["compress/file_metric"] == metadata["metric"]
    media = {path.parent.name for path in demo[0].rglob("files/media/*/compress/*")} | {
        path.parent.parent.name for path in demo[0].rglob("files/media/*/compress/*")
    }
    assert {"images", "table"} <= media


@pytest.mark.xdist_group("demo")
def test_resume_and_init_from_take_the_demo_checkpoint(demo: tuple[Path, str], tmp_path: Path) -> None:
    last = demo[0] / "checkpoints" / "last.ckpt"
    options = [*FAST, "control=false", "logger=none", f"hydra.run.dir={tmp_path / 'resumed'}"]
    tuned = ["compression=finetune", f"init_from={last}", f"dir={tmp_path}"]
    in_process("experiment=mnist_prune_int8", *tuned, *options[:-1])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["compressed"]["sparsity"] >= 0.9
    text = command(
        "experiment=mnist_prune_int8", f"ckpt_path={last}", *options, "trainer.max_epochs=3", "~compression.export"
    )
    assert "Restored all states" in text


def test_a_sweep_is_one_run_per_job_in_one_group_and_one_table(tmp_path: Path) -> None:
    """In several processes; the recipes below are a sweep in one."""
    text = command(
        *("-m", "experiment=mnist_prune_int8", "sweep=sparsity", "trainer.max_epochs=1", "hydra/launcher=joblib"),
        *("+trainer.limit_train_batches=20", "+trainer.limit_val_batches=1", "control=false"),
        "~compression.export",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )
    runs = offline_runs(tmp_path)
    assert [r.name.split()[0] for r in runs] == ["0", "1", "2"]
    assert [r.name.partition("sparsity=")[2].split()[0] for r in runs] == ["0.5", "0.8", "0.9"]
    assert len({r.run_id for r in runs}) == 3
    assert len({r.group for r in runs}) == 1
    assert runs[0].group
    assert [r.summary["compress/final_sparsity"] for r in runs] == pytest.approx([0.5, 0.8, 0.9], abs=1e-4)
    assert text.count("3 runs, val_acc against bytes as zstd") == 1


def test_sweep_returns_the_objective(tmp_path: Path) -> None:
    overrides = ["experiment=mnist_prune_int8", "compression=magnitude", "control=false", "logger=none"]
    overrides += [
        "trainer.max_epochs=1",
        "+trainer.limit_train_batches=20",
        "+trainer.limit_val_batches=2",
        f"dir={tmp_path}",
    ]
    value = in_process(*overrides, "objective=artifacts.0.metric")
    report = json.loads((tmp_path / "report.json").read_text())
    assert value == report["artifacts"][0]["metric"]


RECIPES = {
    **dict.fromkeys(["magnitude", "finetune", "distill", "channels", "layers", "rigl", "n_of_m"], 32),
    **dict.fromkeys(["int8", "prune_int8", "ptq", "bert", "vit", "unet", "keyword", "forecaster", "graph"], 8),
    "ternary": 2,
}


SOME_RECIPES = ("prune_int8", "channels", "ternary", "distill")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    """The folders of a run of each, as one sweep."""
    folder = tmp_path_factory.mktemp("recipes")
    names = list(RECIPES if request.config.getoption("--full") else SOME_RECIPES)
    command(
        *(
            "-m",
            "model._target_=tests.config.own_data.Deep",
            "data._target_=lightning.pytorch.LightningDataModule.from_datasets",
        ),
        *("data=mlp", "logger=csv", f"compression={','.join(names)}", "trainer.max_epochs=8"),
        *("trainer.accelerator=cpu", f"hydra.searchpath=[file://{ROOT / 'tests' / 'config'}]"),
        f"hydra.sweep.dir={folder}",
    )
    return {name: folder / str(number) for number, name in enumerate(names)}


@pytest.mark.xdist_group("recipes")
@pytest.mark.parametrize("recipe", some(RECIPES, *SOME_RECIPES))
def test_every_recipe_takes_a_users_own_classes(recipe: str, recipes: dict[str, Path]) -> None:
    report = json.loads((recipes[recipe] / "report.json").read_text())
    assert report["artifacts"][0]["agreement"] >= 0.99
    bits = {row["weight_bits"] for row in report["layers"]}
    assert bits == {RECIPES[recipe]}


OWN = [
    *("model._target_=tests.zoo.MLP", "data._target_=lightning.pytorch.LightningDataModule.from_datasets", "data=mlp"),
    *("logger=none", "trainer.accelerator=cpu", f"hydra.searchpath=[file://{ROOT / 'tests' / 'config'}]"),
    *("+trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false"),
]


def test_search_meets_its_budgets_as_measured_on_the_file(tmp_path: Path) -> None:
    budgets = {"macs": 1000, "bytes": 8000}
    text = command(
        *("task=search", *OWN, "trainer.max_epochs=4", "search.levels=[0.25,0.5,0.75]"),
        *(f"budget.{name}={value}" for name, value in budgets.items()),
        f"hydra.run.dir={tmp_path}",
    )
    state = json.loads((tmp_path / "search.json").read_text())
    found = state["found"]
    assert state["met"]
    assert found["trained"]
    assert found["macs"] <= 1000 < 16 * 32 + 32 * 32 + 32 * 4
    (file,) = tmp_path.glob("point*/deploy/model.onnx")
    assert found["bytes"] == file.stat().st_size <= 8000
    report = json.loads(next(tmp_path.glob("point*/report.json")).read_text())
    assert report["artifacts"][0]["metric"] == found["metric"]
    assert report["artifacts"][0]["integer_kernels"] == 3
    assert (tmp_path / "dense.ckpt").is_file()
    # the largest model that meets them: costs fall along the way, and the point before it was probed and misses
    costs = [point["cost"] for point in state["points"]]
    assert costs == sorted(costs, reverse=True)
    plans = [point["plan"] for point in state["points"]]
    probed = {plans.index(c["plan"]): c["macs"] <= 1000 and c["bytes"] <= 8000 for c in state["tried"]}
    assert not probed[plans.index(found["plan"]) - 1]
    assert "found" in text


@pytest.mark.runtimes
def test_search_for_a_microcontroller_is_proven_by_its_interpreter(tmp_path: Path) -> None:
    options = ["model._target_=tests.config.own_data.Relu", "trainer.max_epochs=2", "search.teacher=false"]
    options += ["search.levels=[0.25,0.5,0.75]", "search.format=tflm", "search.rounds=2"]
    budgets = {"flash": 5000, "sram": 2000}
    text = command(
        *("task=search", *OWN, *options, *(f"budget.{name}={value}" for name, value in budgets.items())),
        f"hydra.run.dir={tmp_path}",
    )
    state = json.loads((tmp_path / "search.json").read_text())
    found = state["found"]
    assert state["met"]
    (file,) = tmp_path.glob("point*/deploy/model.tflite")
    assert found["bytes"] == file.stat().st_size <= budgets["flash"]
    runner = Runner(file, torch.zeros(1, 4))
    assert found["arena_bytes"] == runner.arena_bytes <= budgets["sram"]
    assert found["latency_ms"] is None
    largest = [c for c in state["tried"] if c["arena_bytes"] > budgets["sram"] or c["bytes"] > budgets["flash"]]
    assert largest
    assert "arena" in text


@nightly
def test_search_for_a_download_takes_zeros_bits_and_channels_layer_by_layer(tmp_path: Path) -> None:
    options = ["trainer.max_epochs=4", "search.teacher=false", "search.levels=[0.5]", "search.bits=[4,2]"]
    options += ["search.sparsities=[0.5,0.9]"]
    command("task=search", *OWN, *options, "budget.bytes_zstd=1500", f"hydra.run.dir={tmp_path}")
    found = json.loads((tmp_path / "search.json").read_text())["found"]
    # what the first points that are trained measure may lie above the budget
    files = tmp_path.glob("point*/deploy/model.onnx")
    (file,) = [path for path in files if weigh(path)[1] == found["bytes_zstd"]]
    assert found["bytes_zstd"] <= 1500
    layers = {row["name"]: row for row in json.loads((file.parents[1] / "report.json").read_text())["layers"]}
    for name, row in layers.items():
        assert row["weight_bits"] == found["plan"]["bits"].get(name, 8)
        assert row["sparsity"] >= found["plan"]["sparsities"].get(name, 0.0) - 1 / row["num_params"]
    assert found["plan"]["bits"]
    assert found["plan"]["sparsities"]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ([], "accepted is one or more of bytes, bytes_zstd, latency_ms, macs, metric_drop"),
        (["budget.bytes=-1"], "each above 0"),
        (["budget.sram=4000"], "budget.sram=4000 is proven by the interpreter of microcontrollers"),
        (["budget.flash=4000", "search.format=openvino"], "search.format='openvino' is none"),
        (["budget.latency_ms=1", "search.format=tflm"], "say nothing of a board"),
        (["budget.bytes=100"], "cannot be met with int8; the nearest reaches bytes"),
        (["budget.macs=1000", "search.monitor=val_f1"], "search.monitor='val_f1': validation does not log it"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_words(budget: list[str], message: str, tmp_path: Path) -> None:
    options = ["trainer.max_epochs=1", "search.levels=[0.5]"]
    with pytest.raises(ValueError, match=re.escape(message)):
        in_process("task=search", *OWN, *options, *budget, f"dir={tmp_path}")
    assert not list(tmp_path.glob("point*"))


def test_sensitivity_of_a_checkpoint(tmp_path: Path) -> None:
    options = ["task=sensitivity", *OWN, "sensitivity.bits=[2]", "sensitivity.sparsities=[0.9]"]
    command(*options, "trainer.max_epochs=4", f"hydra.run.dir={tmp_path / 'a'}")
    state = json.loads((tmp_path / "a" / "sensitivity.json").read_text())
    assert [(row["layer"], row["kind"]) for row in state["rows"]] == [
        (layer, kind) for layer in ("net.0", "net.3", "net.5") for kind in ("sparsity", "bits")
    ]
    assert state["cached"] == 3
    assert (tmp_path / "a" / "sensitivity.png").is_file()
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    text = command(*options, f"init_from={last}", "sensitivity.hessian=true", f"hydra.run.dir={tmp_path / 'b'}")
    again = json.loads((tmp_path / "b" / "sensitivity.json").read_text())
    assert again["rows"] == state["rows"]
    assert set(again["traces"]) == {"net.0", "net.3", "net.5"}
    assert "Epoch" not in text


@pytest.mark.xdist_group("recipes")
def test_pareto_of_a_sweep_again(recipes: dict[str, Path]) -> None:
    folder = next(iter(recipes.values())).parent
    before = json.loads((folder / "pareto.json").read_text())
    assert len(before["runs"]) == len(recipes)
    text = command("task=pareto", f"runs={folder}", "pareto.cost=latency_ms", f"hydra.run.dir={folder / 'again'}")
    after = json.loads((folder / "pareto.json").read_text())
    assert (before["cost"], after["cost"]) == ("bytes_zstd", "latency_ms")
    assert "again: lightning-compress " in text
    assert "compression=" in after["runs"][after["chosen"]]["command"]


def test_an_unknown_task_is_refused() -> None:
    """And the command ends with an error; the other messages are read in this process."""
    assert "task='prune': accepted are 'train', 'sensitivity', 'search' and 'pareto'" in command("task=prune", ok=False)


def test_plain_trainer_script(tmp_path: Path) -> None:
    run("-m", "experiments.foreign.trainer", cwd=tmp_path)
    assert (tmp_path / "outputs" / "trainer" / "deploy" / "model.onnx").is_file()


def test_lightning_cli(tmp_path: Path) -> None:
    options = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "20"]
    options += ["--trainer.limit_val_batches", "2", "--trainer.default_root_dir", str(tmp_path)]
    run("-m", "experiments.foreign.cli", "fit", "--config", "experiments/foreign/cli.yaml", *options, cwd=ROOT)
    report = json.loads((tmp_path / "report.json").read_text())
    bits = {row["name"]: row["weight_bits"] for row in report["layers"]}
    assert bits["stem.0"] == 32
    assert bits["head"] == 8


def test_foreign_hydra_application(tmp_path: Path) -> None:
    options = [
        "trainer.max_epochs=2",
        "+trainer.limit_train_batches=20",
        "+trainer.limit_val_batches=2",
        f"hydra.run.dir={tmp_path}",
    ]
    text = run("-m", "experiments.foreign.app", "+compression=prune_int8", "callbacks.prune.sparsity=0.8", *options)
    assert "onnxscript" not in text  # the exporter has its loggers, and Hydra gave the root a handler
    assert "onnx_ir" not in text
    assert 0.8 <= json.loads((tmp_path / "report.json").read_text())["compressed"]["sparsity"] < 0.81


def test_foreign_application_never_trains_uncompressed_by_mistake(tmp_path: Path) -> None:
    """Even without the search path line our recipes are found; what is no recipe is an error."""
    (tmp_path / "app.py").write_text(
        "import hydra\n@hydra.main(version_base='1.3', config_path='.', config_name='app')\n"
        "def main(cfg): print('callbacks:', *cfg.callbacks)\nmain()\n"
    )
    (tmp_path / "app.yaml").write_text("callbacks: {}\n")
    assert "callbacks: prune finetune quantize report export" in run("app.py", "+compression=prune_int8", cwd=tmp_path)
    assert "callbacks: prune report export quantize" in run("app.py", "+compression=[magnitude,int8]", cwd=tmp_path)
    assert "Could not find 'compression/prune_int9'" in run("app.py", "+compression=prune_int9", cwd=tmp_path, ok=False)
    assert "model" not in run("app.py", "--info", "searchpath", cwd=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compression=prune_int9"], "Could not find 'compression/prune_int9'"),
        (["compression=none"], "model names no class. Give model._target_=your.module.Class"),
        (["experiment=mnist_prune_int8", "init_from=no.ckpt"], "init_from='no.ckpt': there is no such checkpoint"),
        (["experiment=mnist_prune_int8", "compression.prune.sparsity=90"], "GradualPruning.sparsity=90"),
        (["experiment=mnist_prune_int8", "compression.export.formats=[tflite9]"], "formats='tflite9': accepted are"),
        (["experiment=mnist_prune_int8", "compression.quantize.scheme=int9"], "scheme='int9'"),
        (["experiment=mnist_prune_int8", "compression.quantize.scheme=8"], "accepted is a Scheme"),
    ],
)
def test_wrong_configuration_is_refused_in_words(
    overrides: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        in_process(*overrides, "control=false", "logger=none", f"dir={tmp_path}")
    assert "Epoch" not in "".join(capfd.readouterr())


CONFIGURATIONS = sorted(path.relative_to(ROOT / "conf") for path in (ROOT / "conf").glob("*/**/*.yaml"))


def test_every_configuration_is_what_its_command_composes() -> None:
    """The first comment of a file is the command that takes it, or what to put in the place of what is missing."""
    assert len(CONFIGURATIONS) > 20
    for path in CONFIGURATIONS:
        group = path.parts[0]
        name = path.relative_to(group).with_suffix("").as_posix()
        assert choices(f"{group}={name}")[group] == name
        lines = (ROOT / "conf" / path).read_text().splitlines()
        first = next(line for line in lines if not line.startswith("# @package"))
        assert first.startswith("# "), f"{path}: {first}"
        for line in lines:
            program, _, rest = line.removeprefix("# ").partition(" ")
            if line.startswith("# ") and program == "lightning-compress":
                overrides = [word.rstrip(":") for word in rest.split(" (")[0].split(": ")[0].split() if "=" in word]
                assert overrides, f"{path}: {line}"
                assert name in choices(*overrides).values(), f"{path}: {line}"


def test_recipes_spell_all_arguments() -> None:
    """So that each can be set without a plus; those that a recipe leaves alone are as the class has them."""
    for name in names_of_recipes():
        text = (ROOT / "conf" / "compression" / f"{name}.yaml").read_text()
        for key, node in yaml.safe_load(text).items():
            parameters = inspect.signature(get_object(node.pop("_target_"))).parameters
            assert set(node) == set(parameters), f"{name}: {key}"
            rest = re.split(rf"^{key}:", text, flags=re.MULTILINE)[1].partition("# the rest")[2]
            rest = re.split(r"^\w", rest, flags=re.MULTILINE)[0].partition("\n")[2]
            for argument, value in (yaml.safe_load(rest) or {}).items():
                default = parameters[argument].default
                assert value == (list(default) if default == () else default), f"{name}: {key}.{argument}"


def choices(*overrides: str) -> dict[str, str]:
    """The file that was chosen of each group."""
    cfg: Any = composed(*overrides, return_hydra_config=True)
    return {group: choice for group, choice in cfg.hydra.runtime.choices.items() if choice is not None}


def test_the_sweep_of_wandb_asks_for_what_hydra_takes() -> None:
    sweep: Any = yaml.safe_load((ROOT / "experiments" / "wandb_sweep.yaml").read_text())
    ((name, values),) = sweep["parameters"].items()
    overrides = [part for part in sweep["command"] if "${" not in part] + [f"{name}={values['values'][0]}"]
    cfg = composed(*overrides)
    ours: Any = composed("experiment=mnist_prune_int8", "sweep=sparsity", return_hydra_config=True)
    assert OmegaConf.select(cfg, name) == values["values"][0]
    assert ours.hydra.sweeper.params[name] == ",".join(map(str, values["values"]))
    assert sweep["metric"]["name"] == "compress/final_metric"


def test_a_strict_run_that_misses_its_target_is_an_error_and_leaves_its_report(tmp_path: Path) -> None:
    stopped = ["trainer.max_epochs=1", "+trainer.limit_train_batches=4", "+trainer.max_time=00:00:00:00"]
    fast = ["+trainer.limit_val_batches=1", "~compression.export", "control=false", f"dir={tmp_path}"]
    with pytest.raises(TargetMissed, match=r"asked sparsity 0\.9, reached 0, because max_time ended the run"):
        in_process("experiment=mnist_prune_int8", *stopped, *fast, "strict=true")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["target"] for row in report["targets"] if row["missed"]] == ["sparsity", "bits"]
    (run_,) = offline_runs(tmp_path)
    assert [row["compress/targets_missed"] for row in run_.history if "compress/targets_missed" in row] == [2]
    assert "asked sparsity 0.9" in run_.summary["compress/targets"]
