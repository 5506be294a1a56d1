"""What optimizers hold of a weight, and what becomes of it when the weight shrinks; each is tried before it happens."""

from __future__ import annotations

import copy
from typing import Any

import lion_pytorch
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.layers import Layer
from lightning_compress.pruning import Magnitude, Masks
from lightning_compress.pruning.patterns import Element
from lightning_compress.structure.held import forget_states, innermost, may_swap, states_of, with_wrapped
from lightning_compress.structure.optimizers import check_forgetting, check_optimizer, copy_optimizer, elementwise
from lightning_compress.structure.record import Record, apply_record

FIT: dict[str, Any] = {
    "Adam": torch.optim.Adam,
    "AdamWScheduleFree": schedulefree.AdamWScheduleFree,
    "Lion": lion_pytorch.Lion,
    "AdEMAMix": pytorch_optimizer.AdEMAMix,
    "Lookahead": lambda ps: pytorch_optimizer.Lookahead(torch.optim.Adam(ps), k=2),
    "SAM": lambda ps: pytorch_optimizer.SAM(ps, torch.optim.SGD, lr=0.1, momentum=0.9),
}
if hasattr(torch.optim, "Muon"):  # of torch 2.9
    FIT["Muon"] = lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2])
ANEW: dict[str, Any] = {
    "SOAP": pytorch_optimizer.SOAP,
    "Shampoo": pytorch_optimizer.Shampoo,
    "Adafactor": torch.optim.Adafactor,
    "Prodigy": prodigyopt.Prodigy,
    "Lookahead(SOAP)": lambda ps: pytorch_optimizer.Lookahead(pytorch_optimizer.SOAP(ps), k=2),
}
REFUSED: dict[str, Any] = {
    "LBFGS": torch.optim.LBFGS,
    "TRAC": lambda ps: pytorch_optimizer.TRAC(torch.optim.SGD(ps, 0.1)),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def step(model: nn.Module, optimizer: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 6)).square().mean()
        loss.backward()
        return loss

    if hasattr(optimizer, "train"):
        optimizer.train()
    closure()
    optimizer.step(torch.enable_grad()(closure))


def values(optimizer: Any) -> list[Tensor]:
    return [x for x in tree_leaves([state for _, _, state in states_of(optimizer)]) if isinstance(x, Tensor)]


def half() -> Record:
    """Keep half of the hidden channels."""
    keep = torch.arange(0, 8, 2)
    kept = {
        "0.weight": {0: keep},
        "0.bias": {0: keep},
        "2.weight": {0: keep, 1: keep},
        "2.bias": {0: keep},
        "4.weight": {1: keep},
    }
    attributes = {"0": {"out_features": 4}, "2": {"in_features": 4, "out_features": 4}, "4": {"in_features": 4}}
    return Record(kept, attributes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*FIT, *ANEW])
def test_an_optimizer_steps_on_after_its_parameters_have_shrunk(name: str) -> None:
    model = net()
    optimizer = {**FIT, **ANEW}[name](list(model.parameters()))
    assert bool(check_optimizer("ChannelPruning", optimizer)) == (name in ANEW)
    for _ in range(3):
        step(model, optimizer)
    before = {(id(each), id(p)): dict(state) for each, p, state in states_of(optimizer)}
    apply_record(model, half(), [optimizer])
    named = {id(p): key for key, p in model.named_parameters()}
    cut = 0
    for each, p, state in states_of(optimizer):
        for key, value in state.items():
            old = before[id(each), id(p)][key]
            if isinstance(value, Tensor) and value.dim() and value.shape == p.shape:
                for axis, keep in half().kept.get(named[id(p)], {}).items():
                    old = old.index_select(axis, keep)
                    cut += 1
                assert torch.equal(value, old)
    assert (cut > 0) == (name in FIT or name == "Lookahead(SOAP)")
    weights = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        step(model, optimizer)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for old, p in zip(weights, model.parameters(), strict=True):
        assert torch.isfinite(p).all()
        assert torch.equal(old, p) != (id(p) in trained)


@pytest.mark.parametrize("name", REFUSED)
def test_one_that_would_not_step_on_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"LayerPruning: {name} keeps state that cannot shrink"):
        check_optimizer("LayerPruning", REFUSED[name](list(net().parameters())))


@pytest.mark.parametrize("name", [*FIT, *ANEW])
def test_a_trial_leaves_everything_as_it_is(name: str) -> None:
    model = net()
    optimizer = {**FIT, **ANEW}[name](list(model.parameters()))
    step(model, optimizer)
    torch.optim.lr_scheduler.StepLR(innermost(optimizer), 2)  # it patches the step
    weights = copy.deepcopy(model.state_dict())
    held = copy.deepcopy(values(optimizer))
    random = torch.get_rng_state()
    check_optimizer("ChannelPruning", optimizer)
    elementwise(optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip(held, values(optimizer), strict=True))


def test_a_copy_steps_as_the_original_and_changes_other_parameters() -> None:
    model, twin = net(), net()
    optimizer = pytorch_optimizer.Lookahead(torch.optim.Adam(model.parameters(), 0.1), k=2)
    step(model, optimizer)
    twin.load_state_dict(model.state_dict())
    memo: dict[int, Any] = {id(p): q for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    copied = copy_optimizer(optimizer, memo)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        step(twin, copied)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for _ in range(3):
        step(model, optimizer)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())


def test_second_copies_of_dropped_weights_are_zero_and_coordinates_stay() -> None:
    model = net()
    layers = [Layer(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for make, copies in ((FIT["Lookahead"], True), (pytorch_optimizer.SOAP, False)):
        optimizer = make(list(model.parameters()))
        step(model, optimizer)
        masks = Masks(layers)
        masks.update(Magnitude(), Element(), 0.5, "global")
        before = copy.deepcopy(values(optimizer))
        masks.apply_to_states(elementwise(optimizer))
        if not copies:
            assert all(torch.equal(x, y) for x, y in zip(before, values(optimizer), strict=True))
            continue
        for _, p, state in states_of(optimizer):
            for value in state.values():
                if isinstance(value, Tensor) and value.dim() == 2:
                    assert not value[p == 0].any()
                    assert value[p != 0].any()


def test_what_is_wrapped_and_what_swaps_is_known() -> None:
    params = list(net().parameters())
    inner = torch.optim.SGD(params, 0.1)
    outer = pytorch_optimizer.Lookahead(inner)
    assert with_wrapped(outer) == [outer, inner]
    assert may_swap(outer)
    assert may_swap(schedulefree.SGDScheduleFree(params))
    assert not may_swap(inner)


def test_all_that_is_known_is_forgotten_where_that_can_be() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    check_forgetting("GradualPruning", optimizer)
    step(model, optimizer)
    forget_states(optimizer)
    assert not optimizer.state
    with pytest.raises(ValueError, match="Lookahead keeps state that cannot be forgotten"):
        check_forgetting("GradualPruning", FIT["Lookahead"](list(model.parameters())))
