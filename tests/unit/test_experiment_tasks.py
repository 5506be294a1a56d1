"""The benchmark tasks: sizes, batches, budgets."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments import forecast, keywords, pitch, shakespeare, tasks
from experiments.arena import TASKS as ARENA
from experiments.bench.prune_accuracy import _row
from experiments.jobs import PEERS, QUANTIZED_PEERS, Job, Run, best_factors, smallest_scale
from experiments.peers.plain import global_magnitude
from experiments.peers.torch_pruning import group_norm, random_channels
from experiments.recipes import OURS, QUANTIZED
from experiments.tasks import TASKS, Batches, Data, data_folder, mfcc, roll3, roll6_mask6
from experiments.training import Budget, accuracy, dense, fit, num_macs, train, weights_of
from lightning_compress.layers import find_layers
from lightning_compress.pruning import Element, Masks, SparedMagnitude
from lightning_compress.testing import check_criterion

from ..nightly import some

SHAPES = {"lenet300": (28, 28), "mnist1d": (1, 40), "fsdd": (1, 47, 10)}


def toy(name: str = "mnist1d", num: int = 400) -> Data:
    """Separable noise in a task's shape."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(num) % 10
    centers = torch.randn(10, *SHAPES[name], generator=generator)
    x = centers[y] + 0.5 * torch.randn(num, *SHAPES[name], generator=generator)
    return Data(x, y, x[:100], y[:100])


@pytest.mark.parametrize(("name", "num"), [("lenet300", 266_610), ("mnist1d", 62_826), ("fsdd", 23_050)])
def test_models_have_the_published_size(name: str, num: int) -> None:
    model = TASKS[name].build()
    assert sum(p.numel() for p in model.parameters()) == num
    assert model(torch.randn(3, *SHAPES[name])).shape == (3, 10)
    assert sum(w.numel() for w in weights_of(TASKS[name].build(0.5))) < 0.5 * num


def test_multiplications_are_counted() -> None:
    assert num_macs(TASKS["lenet300"].build(), torch.randn(1, 28, 28)) == 784 * 300 + 300 * 100 + 100 * 10


def test_mfcc_of_a_clip_has_47_frames_and_tells_tones_apart() -> None:
    time = torch.arange(8000) / 8000
    low, high = (mfcc(torch.sin(2 * torch.pi * f * time)[None]) for f in (200, 3000))
    assert low.shape == (1, 47, 10)
    assert float(low[0, 20, 1]) > float(high[0, 20, 1])


@pytest.mark.parametrize("augment", [roll3, roll6_mask6])
def test_augmentation_follows_from_its_generator(augment: Any) -> None:
    x = torch.randn(4, 1, 47, 10) if augment is roll6_mask6 else torch.randn(4, 1, 40)
    once, again = (augment(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.shape == x.shape
    if augment is roll3:
        assert torch.equal(once.sort(2).values, x.sort(2).values)
    else:
        assert ((once == 0).all(3).sum(2) == 6).all()


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    data = toy()
    seen: list[list[Tensor]] = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        batches = Batches(data.x_train, data.y_train, 64, 5, roll3)
        seen.append([x for _ in range(2) for x, _ in batches])
    assert len(seen[0]) == 2 * (400 // 64)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert not torch.equal(seen[0][0], seen[0][6])
    assert not torch.equal(seen[0][0], next(iter(Batches(data.x_train, data.y_train, 64, 6, roll3)))[0])


class Recorder(nn.Module):
    """Keeps a number of every training batch."""

    def __init__(self, model: nn.Module, seen: list[float]) -> None:
        super().__init__()
        self.model, self.seen = model, seen

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(float(x.sum()))
        return self.model(x)


def _recorded(method: Any, model: nn.Module, data: Data) -> list[float]:
    seen: list[float] = []
    method(Recorder(copy.deepcopy(model), seen), Budget(TASKS["mnist1d"], data, 1, 2, 0.02), 0.9)
    return seen


@pytest.mark.filterwarnings("ignore")
def test_every_method_sees_the_same_batches() -> None:
    model, data = TASKS["mnist1d"].build(), toy()
    expected = _recorded(dense, model, data)
    assert len(expected) == 12
    for name, method in {**PEERS, **OURS}.items():
        assert _recorded(method, model, data) == expected, name


@pytest.mark.filterwarnings("ignore")
def test_plain_torch_and_lightning_train_alike() -> None:
    model, budget = TASKS["mnist1d"].build(), Budget(TASKS["mnist1d"], toy(), 1, 2, 0.02)
    ours, theirs = train(copy.deepcopy(model), budget), fit(copy.deepcopy(model), budget, [pl.Callback()])
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert accuracy(ours, budget.data) == accuracy(theirs, budget.data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*PEERS, *OURS])
def test_methods_reach_their_sparsity(name: str) -> None:
    model = TASKS["mnist1d"].build()
    model = {**PEERS, **OURS}[name](model, Budget(TASKS["mnist1d"], toy(), 1, 2, 0.02), 0.9)
    left = sum(int(torch.count_nonzero(w)) for w in weights_of(model))
    assert left / sum(w.numel() for w in weights_of(model)) == pytest.approx(0.1, abs=2e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [group_norm, random_channels])
def test_channels_are_taken_until_multiplications_are_few(method: Any) -> None:
    task, data = TASKS["mnist1d"], toy()
    macs = num_macs(task.build(), data.x_train[:1])
    model = method(task.build(), Budget(task, data, 1, 1, 0.02), 4)
    assert 0.21 * macs < num_macs(model, data.x_train[:1]) <= 0.25 * macs
    assert model(data.x_test).shape == (100, 10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some(["ternary", "ternary_alone", "naive_ternary"], "ternary"))
def test_ternary_weights_take_three_values(name: str) -> None:
    model, budget = TASKS["mnist1d"].build(), Budget(TASKS["mnist1d"], toy(), 1, 20, 0.02)  # 120 steps
    model = {**QUANTIZED, **QUANTIZED_PEERS}[name](model, budget, 0.0)
    for weight in weights_of(model):
        rows = weight.flatten()[None] if name == "naive_ternary" else weight.flatten(1)
        assert all(len(row.unique()) <= 3 for row in rows)
    assert (smallest_scale(model) > 0) == (name == "ternary_alone")


def test_a_cut_takes_a_sixth_and_shares_nothing() -> None:
    data = Data(torch.arange(600.0), torch.arange(600), torch.empty(0), torch.empty(0))
    cut = data.cut(0)
    assert (len(cut.y_train), len(cut.y_test)) == (500, 100)
    assert set(cut.y_train.tolist()) | set(cut.y_test.tolist()) == set(range(600))
    assert not torch.equal(cut.y_test, data.cut(1).y_test)


def test_missing_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"fsdd.npz is missing: the Free Spoken Digit Dataset.*--data"):
        tasks.fsdd(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert data_folder() == Path("data")
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert data_folder() == Path("shared/data")


def test_mnist_is_read_and_normalized(tmp_path: Path) -> None:
    x = np.full((2, 28, 28), 255, np.uint8)
    np.savez(tmp_path / "mnist70k.npz", x_train=x, y_train=[1, 2], x_test=x, y_test=[3, 4])
    data = tasks.mnist(tmp_path)
    assert data.x_train.shape == (2, 28, 28)
    assert float(data.x_test[0, 0, 0]) == pytest.approx((1 - 0.1307) / 0.3081)
    assert data.y_test.tolist() == [3, 4]


def test_the_rate_is_chosen_on_the_mean_and_failures_are_counted() -> None:
    def run(factor: float, seed: int, value: float, failure: str = "") -> Run:
        return Run(Job("fsdd", "random", 0.9, factor, seed, True, Path(), Path()), value, 0.9, 1.0, failure)

    runs = [run(1, 0, 90), run(1, 1, 80), run(2, 0, 86), run(2, 1, 86), run(4, 0, float("nan"), "ValueError: no")]
    assert best_factors(runs) == {("fsdd", "random", 0.9): 2}
    row = _row([run(1, 0, 90), run(1, 1, 10, "collapsed")], tuned=True)
    assert (row["accuracy"], row["failed"], row["rate"], row["target"]) == (50, 1, "1x", "0.9")


def test_no_layer_is_left_with_fewer_weights_than_outputs() -> None:
    check_criterion(SparedMagnitude())
    layers, _ = find_layers(TASKS["fsdd"].build())
    with torch.no_grad():
        layers[3].weight.mul_(1e-3)
    masks = Masks(layers)
    masks.update(SparedMagnitude(), Element(), 0.95, "global")
    assert masks.sparsity == pytest.approx(0.95, abs=1e-4)
    assert all(int(torch.count_nonzero(x.weight)) >= x.weight.shape[x.out_axis] for x in layers)


GIVEN = {
    "keywords": (torch.zeros(4, 1, 47, 10), torch.arange(4), (4, 10)),
    "forecast": (torch.zeros(4, 96), torch.zeros(4, 24), (4, 24)),
    "shakespeare": (torch.zeros(4, 64).long(), torch.ones(4, 64).long(), (4, 64, 65)),
    "gru": (torch.zeros(4, 64).long(), torch.ones(4, 64).long(), (4, 64, 65)),
}  # inputs, targets and the shape of the outputs


@pytest.mark.parametrize(
    ("name", "num"), [("keywords", 23_050), ("forecast", 60_528), ("shakespeare", 241_985), ("gru", 107_457)]
)
def test_models_of_the_arena_have_the_size_that_they_tell(name: str, num: int) -> None:
    model, (x, _, shape) = ARENA[name].build(), GIVEN[name]
    assert sum(p.numel() for p in model.parameters()) == num
    assert model.eval()(x).shape == shape
    assert ARENA[name].build(0.5)(x).shape == shape
    assert sum(w.numel() for w in weights_of(ARENA[name].build(0.5))) < 0.55 * num
    assert num_macs(model, x[:1]) > 0


@pytest.mark.parametrize("name", GIVEN)
def test_metrics_are_sums_over_examples(name: str) -> None:
    task, (x, y, _) = ARENA[name], GIVEN[name]
    outputs = task.build().eval()(x)
    whole = float(task.metric.sum_of(outputs, y).detach())
    parts = sum(float(task.metric.sum_of(outputs[i : i + 1], y[i : i + 1]).detach()) for i in range(4))
    assert whole == pytest.approx(parts, rel=1e-4)


@pytest.mark.parametrize("name", GIVEN)
def test_every_task_learns_a_batch_by_heart(name: str) -> None:
    task, (x, y, _) = replace(ARENA[name], batch_size=4, augment=None), GIVEN[name]
    model = task.build()
    before = float(task.loss(model(x), y).detach())
    train(model, Budget(task, Data(x, y, x, y), 0, 5, 1e-3))
    assert float(task.loss(model(x), y).detach()) < before


@pytest.mark.filterwarnings("ignore")
def test_adamw_trains_alike_in_plain_torch_and_in_lightning() -> None:
    task = replace(TASKS["mnist1d"], optimizer="adamw")
    model, budget = task.build(), Budget(task, toy(), 1, 2, 1e-3)
    ours, theirs = train(copy.deepcopy(model), budget), fit(copy.deepcopy(model), budget, [pl.Callback()])
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_tie_outlives_pruning_by_hand_and_is_pruned_once() -> None:
    x, y, _ = GIVEN["gru"]
    task = replace(ARENA["gru"], batch_size=4)
    model: Any = global_magnitude(task.build(), Budget(task, Data(x, y, x, y), 0, 2, 1e-3), 0.9)
    assert model.head.weight is model.symbol.weight
    left = sum(int(torch.count_nonzero(w)) for w in weights_of(model))
    assert left / sum(w.numel() for w in weights_of(model)) == pytest.approx(0.1, abs=2e-3)


def test_windows_of_text_are_shifted_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = bytes(range(60, 125)) * 100
    (tmp_path / "tinyshakespeare.txt").write_bytes(text)
    with pytest.raises(ValueError, match="is not tinyshakespeare"):
        shakespeare.characters(tmp_path)
    monkeypatch.setattr(shakespeare, "_SHA256", hashlib.sha256(text).hexdigest())
    data = shakespeare.characters(tmp_path)
    assert data.x_train.shape == data.y_train.shape == (91, 64)
    assert torch.equal(data.x_test[:, 1:], data.y_test[:, :-1])
    assert torch.equal(data.x_train[1:, 0], data.y_train[:-1, -1])  # they do not overlap


def test_series_are_the_same_each_time_and_end_where_the_targets_begin() -> None:
    assert torch.equal(forecast.generated(3), forecast.generated(3))
    net = forecast.Forecaster()
    for parameter in net.parameters():
        parameter.data.zero_()
    x = torch.randn(2, 96)
    assert torch.equal(net(x), x[:, -1:].expand(2, 24))


def test_a_word_keeps_its_energy_in_the_noise_it_is_asked() -> None:
    clips = torch.zeros(4, 8000)
    clips[:, :3000] = torch.sin(torch.arange(3000) / 5)
    once, again = (keywords.noisy(clips, (60.0, 60.0), torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(once, again)
    loud = once.abs() > 0.05 * once.abs().amax(1, keepdim=True)
    assert (loud.sum(1) > 2500).all()
    assert (loud.sum(1) < 3001).all()  # nothing comes around


def test_a_clip_is_brought_to_8_khz() -> None:
    tone = (10_000 * np.sin(2 * np.pi * 1000 * np.arange(30_000) / 22_050)).astype(np.int16)
    spectrum = np.abs(np.fft.rfft(keywords._at_8_khz(tone)))
    assert spectrum.argmax() == 1000
    assert 2 * spectrum.max() / 8000 == pytest.approx(10_000, rel=0.01)


def test_cents_are_those_between_pitches(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduced(outputs: Tensor, how: str) -> Tensor:
        return outputs.argmax(1) / 3

    monkeypatch.setattr(pitch, "_pesto", lambda name: SimpleNamespace(reduce_activations=reduced))
    outputs = torch.eye(384)[[120, 200]]
    assert float(pitch.cents(outputs, torch.tensor([120.0, 203.0]))) == pytest.approx(100.0, rel=1e-3)
    assert float(pitch.cents(outputs, torch.tensor([120.3, 300.0]))) == pytest.approx(110.0, rel=1e-3)
    assert float(pitch.surprise(outputs, torch.tensor([120.0, 200.0]))) == pytest.approx(0.0, abs=1e-6)


def test_what_is_missing_is_named_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keywords.shutil, "which", lambda name: None)
    pitch._pesto.cache_clear()
    with pytest.raises(FileNotFoundError, match="apt-get install -y --no-install-recommends espeak-ng"):
        keywords.keywords(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Run: pip install --no-deps --target out.*pesto-pitch==2.0.1"):
        pitch.build()
    with pytest.raises(FileNotFoundError, match=r"tinyshakespeare.txt is missing.*--data"):
        shakespeare.characters(tmp_path)
