"""Sensitivity against plain code that changes a copy and runs it whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.analysis.replay import Replay
from lightning_compress.analysis.sensitivity import Sensitivity, heat_map, hessian_traces, sensitivity, table
from lightning_compress.forward import Inputs
from lightning_compress.layers import find_layers

BATCHES = [torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (6, 6, 4)]


class Branching(nn.Module):
    """A shortcut around a convolution, and an attention: not a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.calls: list[str] = []
        self.stem.register_forward_hook(lambda *_: self.calls.append("stem"))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.conv(x)
        tokens = x.flatten(2).transpose(1, 2)
        mixed, _ = self.mix(tokens, tokens, tokens, need_weights=False)
        return self.head((tokens + mixed).mean(1))


def net() -> Branching:
    torch.manual_seed(0)
    return Branching().eval()


def score(model: nn.Module) -> float:
    """Depends on every output, and on their order."""
    return sum(float((model(x) * torch.arange(1, 4)).sum()) / (i + 1) for i, x in enumerate(BATCHES))


def by_hand(model: nn.Module, name: str, kind: str, level: float) -> float:
    """Independent code: sorts and rounds one weight of a copy, then runs all of it."""
    changed = copy.deepcopy(model)
    weight = dict(changed.named_parameters())[name]
    with torch.no_grad():
        if kind == "sparsity":
            order = sorted(range(weight.numel()), key=lambda i: abs(float(weight.flatten()[i])))
            for i in order[: round(level * weight.numel())]:
                weight.view(-1)[i] = 0.0
        else:
            for channel in weight:
                scale = channel.abs().max() / min(2 ** (int(level) - 1) - 1, 64)  # 8 bits as files hold them
                channel.copy_((channel / scale).round() * scale)
        return score(changed)


def test_as_if_each_layer_were_changed_by_hand() -> None:
    model = net()
    names = {"stem": "stem.weight", "conv": "conv.weight", "head": "head.weight"}
    names |= {"mix.in_proj_weight": "mix.in_proj_weight", "mix.out_proj": "mix.out_proj.weight"}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        whole = sensitivity(model, score)
        cached = sensitivity(model, score, inputs=Inputs((BATCHES[0],), {}))
    assert whole.cached == 0
    assert cached.cached == len(cached.layers) == 5
    assert cached.metric == pytest.approx(whole.metric, rel=1e-5)
    for found in (whole, cached):
        for row in found.rows:
            with torch.no_grad():
                expected = by_hand(model, names[row.layer], row.kind, row.level)
            assert row.metric == pytest.approx(expected, rel=1e-4, abs=1e-4), row
            assert row.drop == pytest.approx(found.metric - row.metric)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_less_is_better_turns_the_sign() -> None:
    model = net()
    with torch.no_grad():
        more, less = (sensitivity(model, score, sparsities=[0.5], bits=[], more_is_better=b) for b in (True, False))
    assert [row.drop for row in more.rows] == [-row.drop for row in less.rows]


def test_what_stands_before_a_layer_is_computed_once_a_batch() -> None:
    model = net()
    replay = Replay(model, Inputs((BATCHES[0],), {}))
    ran: list[str] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(str(func))
            return func(*args, **(kwargs or {}))

    with replay.of("head.weight", model.head.weight) as found, Counting():
        assert found
        counts = []
        for _ in range(2):
            ran.clear()
            replay.begin()
            with torch.no_grad():
                score(model)
            counts.append((sum("convolution" in op for op in ran), sum("addmm" in op for op in ran)))
    assert counts[0][0] == 2 * len(BATCHES)
    assert counts[1] == (0, len(BATCHES))


def test_other_batches_are_not_taken_for_those_remembered() -> None:
    model = net()
    replay, other = Replay(model, Inputs((BATCHES[0],), {})), torch.randn(6, 1, 8, 8)
    with torch.no_grad(), replay.of("head.weight", model.head.weight):
        for x in (BATCHES[0], other):
            replay.begin()
            torch.testing.assert_close(model(x), model.__class__.forward(model, x))


def test_memory_may_be_short() -> None:
    model = net()
    with torch.no_grad():
        found = sensitivity(model, score, sparsities=[0.5], bits=[], inputs=Inputs((BATCHES[0],), {}), max_bytes=0)
        again = sensitivity(model, score, sparsities=[0.5], bits=[])
    assert [row.metric for row in found.rows] == pytest.approx([row.metric for row in again.rows], rel=1e-5)


def test_a_model_that_cannot_be_captured_is_evaluated_whole() -> None:
    class Branch(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > -1e9 else x

    torch.manual_seed(0)
    model = Branch().eval()
    with torch.no_grad():
        found = sensitivity(model, score, sparsities=[0.5], bits=[4], inputs=Inputs((BATCHES[0],), {}))
    assert found.cached == 0
    assert len(found.rows) == 10


def test_bad_levels_and_patterns_are_named() -> None:
    with pytest.raises(ValueError, match=r"sensitivity.sparsities\[0\]=1.5: accepted"):
        sensitivity(net(), score, sparsities=[1.5])
    with pytest.raises(ValueError, match=r"sensitivity.bits\[0\]=16: accepted"):
        sensitivity(net(), score, bits=[16])
    with pytest.raises(ValueError, match="matches no layer"):
        sensitivity(net(), score, include=["tail"])


def test_an_evaluation_that_breaks_leaves_the_model_as_it_was() -> None:
    model, calls = net(), []

    def broken(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more data")
        return 0.0

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="no more data"):
        sensitivity(model, broken)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_traces_are_those_of_the_whole_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    layers, _ = find_layers(model)
    found = hessian_traces(lambda: F.cross_entropy(model(x), y), layers, num_samples=3000)
    for layer in layers:
        key = f"{layer.name}.weight"

        def loss(weight: Tensor, key: str = key) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, {key: weight}, (x,)), y)

        hessian = torch.autograd.functional.hessian(loss, layer.weight.detach())
        n = layer.weight.numel()
        assert found[layer.name] == pytest.approx(float(hessian.reshape(n, n).trace()) / n, rel=0.1)


def test_written_read_and_shown(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        found = sensitivity(model, score, sparsities=[0.5], bits=[4])
    found.write(tmp_path / "deep" / "s.json")
    assert Sensitivity.read(tmp_path / "deep" / "s.json") == found
    shown = table(found, "val_acc")
    assert shown.row_count == len(found.layers)
    assert [column.header.strip() for column in shown.columns] == ["layer", "-50%", "4 bit"]
    figure = heat_map(found, "val_acc")
    figure.savefig(tmp_path / "map.png")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == found.layers
