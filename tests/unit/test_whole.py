"""A cut that fails in its middle leaves nothing changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress.structure.record import Record, apply_record, structure_of


@pytest.mark.parametrize("wrong", ["no such tensor", "attribute", "block"])
def test_what_fails_in_the_middle_is_undone(wrong: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    twin = copy.deepcopy(model)
    optimizer, others = (torch.optim.AdamW(each.parameters(), 1e-2) for each in (model, twin))
    for each, own in ((model, optimizer), (twin, others)) * 2:
        each(torch.arange(12.0).view(3, 4)).square().sum().backward()
        own.step()
    keep = torch.tensor([0, 2, 5])
    kept = {"0.weight": {0: keep}, "0.bias": {0: keep}, "1.weight": {0: keep}}
    record = Record(kept, {"0": {"out_features": 3}})
    if wrong == "no such tensor":
        record.kept["1.nothing"] = {0: keep}
    elif wrong == "attribute":
        record.attributes["1.nothing"] = {"num_features": 3}
    else:
        record.removed = ["3", "nothing.at.all"]
    identities = [id(p) for p in model.parameters()]
    with pytest.raises((KeyError, AttributeError)):
        apply_record(model, record, [optimizer])
    assert [id(p) for p in model.parameters()] == identities
    assert model[0].out_features == 8
    assert structure_of(model) == {"attributes": {}, "shapes": {}, "removed": []}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
        assert all(torch.equal(value, others.state[q][key]) for key, value in optimizer.state[p].items())
    for each, own in ((model, optimizer), (twin, others)):
        each(torch.arange(12.0).view(3, 4)).square().sum().backward()
        own.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    apply_record(model, Record({"0.weight": {0: keep}, "0.bias": {0: keep}}, {"0": {"out_features": 3}}), [optimizer])
    assert model[0].weight.shape == (3, 4)
