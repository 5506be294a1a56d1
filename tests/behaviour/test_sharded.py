"""ModelParallelStrategy (FSDP2): sharded weights are pruned as one process prunes them."""

from __future__ import annotations

import pytest

from ..harness import in_two_processes
from .sharded import CASES


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    calls = [("tests.behaviour.sharded", "prune", [case]) for case in CASES]
    return dict(zip(CASES, in_two_processes(calls, tmp_path_factory.mktemp("sharded")), strict=True))


@pytest.mark.xdist_group("sharded")
@pytest.mark.parametrize("case", list(CASES))
def test_sharded_weights_are_pruned_as_whole_ones(case: str, found: dict[str, str]) -> None:
    assert found[case] == "ok"
