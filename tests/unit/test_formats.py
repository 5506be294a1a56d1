"""The formats by name."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_compress.callbacks import Export
from lightning_compress.deploy import FORMATS, formats
from lightning_compress.deploy.formats import check_formats, installed_formats, pip_command


@pytest.mark.runtimes
def test_every_format_is_installed_here_and_has_an_exporter_and_a_runner() -> None:
    check_formats(list(FORMATS))
    assert [*installed_formats(), "tflm"] == list(FORMATS)  # which is slow, and written where it is named
    for kind in FORMATS.values():
        assert callable(kind.export)
        assert kind.runner.runtime
        assert kind.suffix.startswith(".")


def test_an_unknown_format_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(
        ValueError,
        match=r"formats='tflite': accepted are 'onnx', 'openvino', 'executorch', 'litert', 'torch' and 'tflm'",
    ):
        check_formats(["onnx", "tflite"])


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = dataclasses.replace(FORMATS["onnx"], packages=("onnx", "no_such_package_xyz"))
    monkeypatch.setitem(formats.FORMATS, "onnx", lacking)
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package_xyz.*lightning-compress\[onnx\]"):
        check_formats(["onnx"])


def test_what_is_not_installed_is_left_out_and_one_command_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = dataclasses.replace(FORMATS["litert"], packages=("no_such_package_xyz",))
    monkeypatch.setitem(formats.FORMATS, "litert", lacking)
    assert "litert" not in installed_formats()
    assert pip_command(["onnx", "litert"]) == "pip install 'lightning-compress[onnx,litert]'"


def test_the_command_names_extras_of_this_distribution(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "pyproject.toml").read_text()
    for kind in FORMATS.values():
        assert not kind.extra or f"\n{kind.extra} = [" in text


def test_without_names_or_with_all_every_installed_format_is_exported() -> None:
    assert Export().formats == Export("all").formats == Export(["all"]).formats == installed_formats()
    assert Export("onnx").formats == Export(["onnx"]).formats == ["onnx"]
