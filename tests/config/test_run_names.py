"""How the command calls its runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from lightning_compress.run_names import names_of_run


@pytest.fixture
def named() -> Any:
    """Names of a run with overrides."""

    def names(*overrides: str) -> dict[str, Any]:
        GlobalHydra.instance().clear()
        with initialize_config_module("lightning_compress.conf", version_base="1.3"):
            HydraConfig.instance().set_config(compose("config", list(overrides), return_hydra_config=True))
        return names_of_run()

    yield names
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


Names = Callable[..., dict[str, Any]]


def test_an_experiment_names_a_run(named: Names) -> None:
    found = named("experiment=mnist_prune_int8", "compression.prune.sparsity=0.8", "trainer.max_epochs=3")
    assert found["name"] == "mnist_prune_int8 sparsity=0.8"
    assert (found["group"], found["job_type"]) == ("mnist_prune_int8", "train")
    assert found["tags"] == ["prune_int8", "train"]


def test_a_model_and_a_recipe_name_a_run_without_an_experiment(named: Names) -> None:
    found = named("model._target_=my.package.Net", "data._target_=my.Data", "compression=int8", "task=search")
    assert found["name"] == "Net int8"
    assert (found["group"], found["job_type"]) == ("int8", "search")


def test_outside_of_the_command_nothing_is_named() -> None:
    assert HydraConfig.instance().cfg is None
    assert names_of_run() == {}
