"""Weights from files of all kinds, by the names of the model that takes them."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_compress.checkpoint import check_structure, read_checkpoint
from lightning_compress.deploy.packed import save_packed
from lightning_compress.objects import objects_in
from lightning_compress.structure.record import Record, apply_record
from lightning_compress.weights import read_weights, that_fit

from .helpers import noise, randomized


class Wrapped(nn.Module):
    """A module that holds its network below a name, as most LightningModules do."""

    def __init__(self, seed: int = 0, classes: int = 4) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.model = nn.ModuleDict({"body": body, "head": nn.Linear(8, classes)})
        randomized(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.model["head"](self.model["body"](x))


def state() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in Wrapped().state_dict().items()}


def under(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state().items()}


def without(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state().items()}


def shards(path: Path) -> Path:
    """The weights in two files, with the index of transformers beside them."""
    names = list(state())
    halves = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, part in halves.items():
        safetensors.torch.save_file({name: state()[name] for name in part}, path.with_name(file))
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}}))
    return index


def saved(content: object) -> Callable[[Path], Path]:
    def save(path: Path) -> Path:
        torch.save(content, path)
        return path

    return save


def packed(path: Path) -> Path:
    save_packed(Wrapped(), path)
    return path


def as_safetensors(path: Path) -> Path:
    safetensors.torch.save_file(without("model."), path)
    return path


OTHERS = {"optimizer": {"state": {0: {"exp_avg": noise(3)}}, "param_groups": [{"lr": 0.1}]}, "step": torch.tensor(3)}
FILES: dict[str, Callable[[Path], Path]] = {
    "of Lightning": saved({"state_dict": state(), "pytorch-lightning_version": "2.6", "callbacks": {}}),
    "a state dict": saved(state()),
    "of the network alone": saved(without("model.")),
    "of DDP": saved(under("module.")),
    "of DDP and torch.compile": saved(under("module._orig_mod.")),
    "of another module": saved({name.replace("model.", "net.", 1): value for name, value in state().items()}),
    "below a key": saved({"model": state(), "ema": state(), **OTHERS}),
    "below any key": saved({"network": without("model."), **OTHERS}),
    "safetensors": as_safetensors,
    "in shards": shards,
    "packed": packed,
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_weights_by_our_names(kind: str, tmp_path: Path) -> None:
    path = FILES[kind](tmp_path / "weights")
    model = Wrapped(1)
    found, said = read_weights("init_from", path, model)
    check_structure(model, found)
    model.load_state_dict(found)
    assert all(torch.equal(value, state()[name]) for name, value in model.state_dict().items())
    assert bool(said) == (kind in {"of the network alone", "of DDP", "of DDP and torch.compile", *PREFIXED})


PREFIXED = ("of another module", "below any key", "safetensors")


def test_names_of_a_compiled_model_are_found(tmp_path: Path) -> None:
    model = nn.Module()
    model._orig_mod = Wrapped(1)
    found, said = read_weights("init_from", FILES["a state dict"](tmp_path / "weights"), model)
    model.load_state_dict(found)
    assert not said


def test_what_is_cut_is_cut_here_too(tmp_path: Path) -> None:
    small, kept = Wrapped(), torch.tensor([0, 3, 5])
    vectors = {f"model.body.1.{name}": {0: kept} for name in ("weight", "bias", "running_mean", "running_var")}
    first = {"model.body.0.weight": {0: kept}, "model.body.0.bias": {0: kept}, "model.body.3.weight": {1: kept}}
    attributes = {"model.body.0": {"out_features": 3}, "model.body.1": {"num_features": 3}}
    apply_record(small, Record(kept=first | vectors, attributes={**attributes, "model.body.3": {"in_features": 3}}))
    save_packed(small, tmp_path / "small")
    model = Wrapped(1).eval()
    model.load_state_dict(read_weights("init_from", tmp_path / "small", model)[0])
    assert torch.equal(model(noise(5, 6)), small.eval()(noise(5, 6)))


def test_what_differs_is_named_with_its_number(tmp_path: Path) -> None:
    path = FILES["of the network alone"](tmp_path / "weights")
    model = Wrapped(1, classes=7)
    model.extra = nn.Linear(2, 2)
    model.model["body"][3] = nn.Identity()
    found, _ = read_weights("init_from", path, model)
    with pytest.raises(ValueError, match="is of another structure") as caught:
        check_structure(model, found, of="init_from='weights'")
    for text in (
        "2 of another shape (model.head.weight is (4, 8) there and (7, 8) here, model.head.bias",
        "2 missing there (extra.weight, extra.bias)",
        "2 unknown here (model.body.3.",
        "init_from='weights'",
    ):
        assert text in str(caught.value)


def test_what_fits_is_taken_for_another_head(tmp_path: Path) -> None:
    model = Wrapped(1, classes=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, _ = read_weights("init_from", FILES["safetensors"](tmp_path / "weights"), model)
    fit, said = that_fit("it", model, found)
    model.load_state_dict(fit, strict=False)
    assert re.match(r"left out 2 of its tensors \(model.head.*; 2 here begin anew \(model.head.weight, ", said)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if "head" in name else state()[name]), name
    with pytest.raises(ValueError, match=r"none of its 11 tensors .*Give another one"):
        that_fit("it", nn.LSTM(3, 2), found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": state(), "b": state()}, "of weights it holds several: 'a', 'b'"),
        ({"step": 3}, "of weights it holds none: 'step'"),
        ({}, "of weights it holds none: nothing"),
        ([noise(3)], "it holds list"),
    ],
    ids=["several", "none", "nothing", "list"],
)
def test_a_file_without_weights_is_refused(content: object, message: str, tmp_path: Path) -> None:
    path = saved(content)(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"init_from='.*x.pt' cannot be read as a checkpoint: {message}"):
        read_weights("init_from", path, Wrapped())


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(index)
    with pytest.raises(ValueError, match=r"init_from='.*x.json' cannot be read"):
        read_weights("init_from", tmp_path / "x.json", Wrapped())


class Odd:
    """A loss, a metric, an encoder ..."""


def test_objects_are_named_by_their_places_and_read_where_they_are_asked_for(tmp_path: Path) -> None:
    parameters: dict[str, Any] = {"odd": Odd(), "width": 3, "nested": [{"loss": nn.MSELoss()}], "act": nn.ReLU}
    parameters |= {"partial": functools.partial(torch.relu), "space": argparse.Namespace(a=1)}
    path = saved({"state_dict": state(), "hyper_parameters": parameters})(tmp_path / "odd.ckpt")
    assert objects_in(path) == [
        f"hyper_parameters['odd'] is a {__name__}.Odd",
        "hyper_parameters['nested'][0]['loss'] is a torch.nn.modules.loss.MSELoss",
        "hyper_parameters['act'] is a torch.nn.modules.activation.ReLU",
        "hyper_parameters['partial'] is a functools.partial",
        "hyper_parameters['space'] is a argparse.Namespace",
    ]
    match = r"init_from='.*' holds more than plain values: hyper_parameters\['odd'\].*and 2 more.*weights_only=False"
    with pytest.raises(ValueError, match=match):
        read_weights("init_from", path, Wrapped())
    assert read_weights("init_from", path, Wrapped(), weights_only=False)[0].keys() == state().keys()
    assert read_checkpoint("path", path, weights_only=False)["hyper_parameters"]["width"] == 3


def test_naming_objects_makes_none_of_them(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "made"),))

    path = saved({"hyper_parameters": {"x": Evil()}})(tmp_path / "evil.ckpt")
    assert objects_in(path) == [f"hyper_parameters['x'] is a {os.mkdir.__module__}.mkdir"]
    with pytest.raises(ValueError, match=r"evil.ckpt' holds more than plain values"):
        read_checkpoint("path", path)
    assert not (tmp_path / "made").exists()
