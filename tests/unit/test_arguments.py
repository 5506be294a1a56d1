"""Arguments of the wrong kind are refused where they are given: each of a table, and whatever chance finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lightning_compress
from experiments.wrong_arguments import CASES, REFUSALS, REQUIRED, fault, field_of, parameters_of, refused
from lightning_compress import Phase, callbacks, pruning, quantization
from lightning_compress.analysis.allocation import allocate
from lightning_compress.analysis.runs import read_runs
from lightning_compress.analysis.sensitivity import hessian_traces
from lightning_compress.pruning import Magnitude

# Those that cannot be made, hold what others made, read files alone, or compute for long.
_LEFT_OUT = {callbacks.Compressing, quantization.QParams, read_runs, allocate, hessian_traces}

# What a user may take for a path is written to or read from, and the rest is passed on.
_PATHS = {"path", "folder", "dirpath", "arguments", "kwargs"}


def public() -> list[Callable[..., Any]]:
    """Every public constructor and function with arguments."""
    modules = (callbacks, pruning, quantization, lightning_compress)
    named = {getattr(module, name) for module in modules for name in module.__all__}
    named |= set(REQUIRED)
    made = {one for one in named if callable(one) and not getattr(one, "__abstractmethods__", None)}
    return sorted(
        (one for one in made - _LEFT_OUT if parameters_of(one)), key=lambda one: (one.__module__, one.__name__)
    )


def odd_values() -> st.SearchStrategy[Any]:
    """Values that somebody might give, or that a configuration file might hold."""
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, 1, 2, 4, 8, 10**400, -1]),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["false", "0.5", "int8", "global", "*", "max", "self"]),
        st.binary(max_size=3),
        st.builds(object),
        st.sampled_from([int, Phase, Magnitude, Magnitude(), Phase(0.1, 0.2), len, ...]),
        st.sampled_from([np.float64(0.5), np.int64(3), np.array([1.0, 2.0]), torch.tensor(0.5), torch.ones(2)]),
    )
    names = st.text(min_size=1, max_size=3)
    return st.one_of(
        plain,
        st.lists(plain, max_size=3),
        st.lists(plain, max_size=3).map(tuple),
        st.dictionaries(st.one_of(names, st.integers()), plain, max_size=2),
        st.sets(names, max_size=2),
    )


@pytest.mark.parametrize("name", sorted({case.call.__name__ for case in CASES}))
def test_a_wrong_argument_is_refused_with_what_is_accepted_and_how_to_fix_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = [case for case in CASES if case.call.__name__ == name]
    errors = [(case, refused(case.call, {case.parameter: case.value})) for case in cases]
    assert not [f"{case}: {lack}: {error!r}" for case, error in errors if (lack := fault(case, error))]


def test_the_table_has_every_constructor() -> None:
    assert len(CASES) >= 300
    missing = {call.__name__ for call in public()} - {case.call.__name__ for case in CASES}
    # Words of schemes with the arguments of int8.
    assert missing <= {word for word in lightning_compress.__all__ if word[0].islower()} | {"Cubic", "Linear"}


@pytest.mark.parametrize("call", public(), ids=lambda call: call.__name__)
def test_whatever_is_given_is_taken_or_refused_by_name(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [name for name in parameters_of(call) if name not in _PATHS]

    # The same values in every run: a test that fails by chance says nothing of a change.
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(names), odd_values())
    def check(name: str, value: object) -> None:
        error = refused(call, {name: value})
        if error is None or isinstance(error, FileNotFoundError):
            return
        assert isinstance(error, REFUSALS), f"{name}={value!r}: {error!r}"
        assert field_of(call, name) in str(error), f"{name}={value!r}: {error!r}"
        assert "ccepted" in str(error), f"{name}={value!r}: {error!r}"

    if names:
        check()
