"""Scores to masks, and masks on weights, against torch.nn.utils.prune."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_compress.layers import Layer, find_layers
from lightning_compress.pruning import Criterion, Cubic, Element, Magnitude, Masks, Random

from .helpers import noise, randomized


def make_net(seed: int = 0) -> nn.Sequential:
    return randomized(nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Linear(7, 9), nn.Linear(9, 3)), seed)


def make_masks(model: nn.Module) -> Masks:
    return Masks(find_layers(model)[0])


def stored(masks: Masks) -> dict[str, Tensor]:
    """The masks as bools, read from the packed state by numpy."""
    found = {}
    for name, entry in masks.state_dict().items():
        bits = np.unpackbits(entry["bits"].numpy(), bitorder="little")[: int(np.prod(entry["shape"]))]
        found[name] = torch.from_numpy(bits.reshape(entry["shape"]).astype(bool))
    return found


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("seed", range(2))
def test_global_scope_is_global_unstructured_of_torch(seed: int, sparsity: float) -> None:
    ours, theirs = make_net(seed), make_net(seed)
    parameters = [(module, "weight") for module in theirs if hasattr(module, "weight")]
    num_weights = sum(module.weight.numel() for module, _ in parameters)
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=-int(-sparsity * num_weights // 1))
    masks = make_masks(ours)
    masks.update(Magnitude(), Element(), sparsity, "global")
    assert all(torch.equal(stored(masks)[name], theirs[int(name)].weight_mask.bool()) for name in ("0", "2", "3"))
    assert all(torch.equal(ours[int(name)].weight, theirs[int(name)].weight) for name in ("0", "2", "3"))


class Scored(Criterion):
    """The magnitude, but of whole layers."""

    def score(self, layer: Layer) -> Tensor:
        return layer.weight.detach().abs()


def test_equal_scores_go_in_stored_order_whether_streamed_or_not() -> None:
    found = []
    for criterion in (Magnitude(), Scored()):
        model = randomized(nn.Sequential(nn.ConvTranspose1d(6, 4, 3), nn.ConvTranspose1d(4, 6, 3, groups=2)))
        for parameter in model.parameters():
            parameter.data = parameter.data.sign()
        masks = make_masks(model)
        masks.update(criterion, Element(), 0.4, "layer")
        found.append(stored(masks))
    for name, kept in found[0].items():
        assert torch.equal(found[1][name], kept)
        assert kept.flatten().sort()[0].equal(kept.flatten()), "the first ones go"


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_layer_scope_is_l1_unstructured_of_torch(sparsity: float) -> None:
    ours, theirs = make_net(), make_net()
    masks = make_masks(ours)
    masks.update(Magnitude(), Element(), sparsity, "layer")
    for name in ("0", "2", "3"):
        module = theirs[int(name)]
        prune.l1_unstructured(module, "weight", amount=-int(-sparsity * module.weight.numel() // 1))
        assert torch.equal(stored(masks)[name], module.weight_mask.bool())
        assert torch.equal(ours[int(name)].weight, module.weight)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_zero_changes_no_bit_and_one_leaves_nothing(scope: str) -> None:
    model, plain = make_net(), make_net()
    masks = make_masks(model)
    masks.update(Magnitude(), Element(), 0.0, scope)
    assert masks.sparsity == 0.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    masks.update(Magnitude(), Element(), 1.0, scope)
    assert masks.sparsity == 1.0
    assert not any(layer.weight.any() for layer in masks.layers)


def test_biases_stay() -> None:
    model, plain = make_net(), make_net()
    make_masks(model).update(Magnitude(), Element(), 1.0, "global")
    assert all(torch.equal(model[i].bias, plain[i].bias) for i in (0, 2, 3))


def test_sparsity_is_the_share_of_zeros_in_all_layers() -> None:
    model = make_net()
    masks = make_masks(model)
    masks.update(Magnitude(), Element(), 0.77, "global")
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert masks.sparsity == pytest.approx(zeros / total)
    assert 0.77 <= masks.sparsity < 0.77 + 1 / total


class Growing(Criterion):
    """Gives what is dropped the highest scores."""

    def score(self, layer: Layer) -> Tensor:
        return 1 / (layer.weight.detach().abs() + 1e-3)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsities", [[0.3, 0.5, 0.9], [0.5, 0.5, 0.5], [0.8, 0.5], [0.9, 0.0]])
def test_what_was_dropped_never_comes_back(sparsities: list[float], scope: str) -> None:
    model = make_net()
    masks = make_masks(model)
    before = stored(masks)
    for sparsity in sparsities:
        masks.update(Growing(), Element(), sparsity, scope)
        after = stored(masks)
        assert not any((after[name] & ~before[name]).any() for name in after)
        before = after


def test_the_dense_part_is_ranked_anew_at_every_update() -> None:
    model = make_net()
    masks = make_masks(model)
    for step in range(1, 5):
        masks.update(Random(seed=step), Element(), Cubic(0.9)(step / 4), "global")
    assert masks.sparsity == pytest.approx(0.9, abs=0.01)


def test_a_dropped_weight_is_plus_zero_when_applied() -> None:
    model = make_net()
    make_masks(model).update(Magnitude(), Element(), 0.9, "global")
    zeros = torch.cat([p.flatten()[p.flatten() == 0] for p in model.parameters() if p.dim() > 1])
    assert zeros.numel() > 100
    assert not torch.signbit(zeros).any()


def test_enforce_drops_again_what_an_optimizer_with_momentum_moved() -> None:
    model = make_net()
    masks = make_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(4):
        for p in model.parameters():
            p.grad = noise(*p.shape, seed=step)
        optimizer.step()
        masks.enforce(masks.layers)
        if step == 1:
            masks.update(Magnitude(), Element(), 0.5, "global")
    for layer in masks.layers:
        assert torch.equal(layer.weight != 0, stored(masks)[layer.name])


def test_enforce_and_apply_touch_only_the_given_layers() -> None:
    model = make_net()
    masks = make_masks(model)
    masks.update(Magnitude(), Element(), 0.5, "global")
    for method in (masks.enforce, masks.apply):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        method(masks.layers[:1])
        assert int((model[0].weight == 0).sum()) == int((~stored(masks)["0"]).sum()) > 0
        assert bool((model[2].weight == 1).all())


def test_gradients_of_dropped_weights_are_zeroed_and_the_others_stay() -> None:
    model = make_net()
    masks = make_masks(model)
    masks.update(Magnitude(), Element(), 0.5, "global")
    model[0].weight.grad, model[0].bias.grad = noise(5, 2, 3, 3), noise(5)
    masks.apply_to_gradients()
    assert torch.equal(model[0].weight.grad, noise(5, 2, 3, 3) * stored(masks)["0"])
    assert torch.equal(model[0].bias.grad, noise(5))
    assert model[2].weight.grad is None


def test_a_copy_of_the_model_is_pruned_by_name_and_the_model_stays() -> None:
    model = make_net()
    masks = make_masks(model)
    masks.update(Magnitude(), Element(), 0.5, "global")
    masks.bind(model)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in (*average.parameters(), *model.parameters()):
            p.fill_(-1.0)
    masks.apply_to_copy(average)
    for layer in masks.layers:
        copied = average.get_submodule(layer.name)
        assert torch.equal(copied.weight != 0, stored(masks)[layer.name])
        assert bool((copied.bias == -1).all())
        assert bool((layer.weight == -1).all())


@pytest.mark.parametrize("num", range(1, 18))
def test_masks_survive_packing_at_every_size(num: int) -> None:
    layer = Layer("fc", nn.Linear(num, 1))
    masks, fresh = Masks([layer]), Masks([layer])
    masks.update(Random(seed=num), Element(), 0.5, "layer")
    state = masks.state_dict()
    assert state["fc"]["bits"].dtype == torch.uint8
    assert state["fc"]["bits"].numel() == -(-num // 8)
    fresh.load_state_dict(state)
    assert torch.equal(stored(fresh)["fc"], stored(masks)["fc"])
    assert fresh.sparsity == masks.sparsity == pytest.approx(-(-num // 2) / num)


def test_the_state_loads_without_pickle_and_prunes_the_same_weights() -> None:
    model, other = make_net(), make_net()
    masks, loaded = make_masks(model), make_masks(other)
    masks.update(Magnitude(), Element(), 0.7, "global")
    buffer = io.BytesIO()
    torch.save(masks.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    loaded.apply()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Linear(7, 9), nn.Linear(9, 3)), "0"),
        (nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Linear(7, 9), nn.Linear(9, 3), nn.Linear(3, 3)), "4"),
        (nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Linear(7, 9)), "3"),
    ],
)
def test_masks_of_another_structure_are_refused_and_the_difference_is_named(other: nn.Module, named: str) -> None:
    masks, state = make_masks(make_net()), make_masks(other).state_dict()
    with pytest.raises(ValueError, match=rf"another structure. It differs at: {named}\. "):
        masks.load_state_dict(state)
    assert masks.sparsity == 0.0
