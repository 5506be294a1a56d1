"""The classic claims of conf/experiment/claims: each of their choices composes, and their tables fold the seeds."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments.claims import by_choice, claims, table
from lightning_compress.tasks.compose import build_all, check

from ..nightly import nightly
from .test_commands import ROOT, command, composed


@pytest.mark.parametrize("name", claims())
def test_every_choice_of_a_claim_composes(name: str, tmp_path: Path) -> None:
    experiment = f"experiment=claims/{name}"
    cfg: Any = composed(experiment, return_hydra_config=True)
    params = {key: values.split(",") for key, values in cfg.hydra.sweeper.params.items()}
    assert params.pop("seed") == ["0", "1", "2"]
    built = set()
    for values in product(*params.values()):
        chosen = [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        cfg = composed(experiment, f"dir={tmp_path}", *chosen)
        check(cfg)
        assert build_all(cfg.compression)
        built.add(json.dumps(plain(cfg.compression), sort_keys=True))
    assert len(built) == len([*product(*params.values())]) > 1, "two choices are the same run"


def plain(node: Any) -> Any:
    """Plain values, with what is chosen in the place of its address."""
    return OmegaConf.to_container(node, resolve=True)


@pytest.mark.parametrize("name", claims())
def test_a_claim_says_its_source_its_command_and_what_was_measured(name: str) -> None:
    text = (ROOT / "conf" / "experiment" / "claims" / f"{name}.yaml").read_text()
    page = (ROOT / "docs" / "claims.md").read_text()
    assert "# claim: " in text
    assert "arXiv:" in text
    assert "# measured: " in text
    assert f"python -m experiments.claims {name}" in text
    assert f"`python -m experiments.claims {name}`" in page


def test_a_table_compares_seed_with_seed() -> None:
    choices = {
        "way=a": {"0": report(0.5, 100), "1": report(0.7, 200)},
        "way=b": {"0": report(0.6, 100), "1": report(0.8, 100)},
    }
    assert table(choices).splitlines()[2:] == [
        "| way=a | 60.00 +- 14.14 | 0.00 +- 0.00 | 150 |",
        "| way=b | 70.00 +- 14.14 | 10.00 +- 0.00 | 100 |",
    ]


def report(metric: float, size: int) -> dict[str, Any]:
    return {"compressed": {"metric": metric}, "packed": {"bytes": size}}


@nightly
def test_a_claim_is_run_and_folded_by_its_choice(tmp_path: Path) -> None:
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=20", "+trainer.limit_val_batches=1"]
    command("-m", "experiment=claims/gradual", *short, "way=gradual,once_late", "seed=0", f"hydra.sweep.dir={tmp_path}")
    choices = by_choice(tmp_path)
    assert [choice.split()[0] for choice in choices] == ["way=gradual", "way=once_late"]
    assert all(list(reports) == ["0"] for reports in choices.values())
    assert table(choices).splitlines()[3].startswith("| way=once_late")
