"""Channels and blocks removed from many kinds of network, against independent code."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from lightning_compress.layers import find_layers
from lightning_compress.pruning import Element, Magnitude, Masks
from lightning_compress.structure.blocks import choose_blocks, find_blocks, freed, record_blocks, score_block
from lightning_compress.structure.choose import (
    Limits,
    drop_fewest,
    drop_lowest,
    num_channels,
    score_groups,
)
from lightning_compress.structure.cuts import num_parameters, record_of
from lightning_compress.structure.groups import Coupling, couple
from lightning_compress.structure.optimizers import check_optimizer
from lightning_compress.structure.proof import choose_channels, prove, prove_groups
from lightning_compress.structure.record import (
    Record,
    apply_record,
    restore_structure,
    structure_of,
    tensors_by_name,
)

from .nets import IMAGES, NETS, ROWS, Concat, Detached, Raw, Recurrent, Shuffle, inputs_for


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = NETS[name]
    torch.manual_seed(0)
    return make().eval(), inputs_for(shape)


def scores_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().abs() for n, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}


def groups_of(model: nn.Module, x: Tensor, **options: Any) -> Coupling:
    coupling = couple(copy.deepcopy(model), lambda m: m(x), **options)
    return prove_groups(model, lambda m: m(x), coupling, Limits())


def planned(model: nn.Module, x: Tensor, share: float = 0.5, **options: Any) -> tuple[Record, Coupling]:
    coupling = groups_of(model, x, **options)
    total = sum(int(group.sizes.sum()) for group in coupling.groups)
    record, _, enough = choose_channels(
        model,
        lambda m: m(x),
        coupling,
        scores_of(model),
        Limits(),
        lambda drops, _: num_channels(coupling.groups, drops) <= (1 - share) * total,
    )
    assert enough
    return record, coupling


def mask(model: nn.Module, record: Record) -> dict[str, Tensor]:
    """Zeros where nothing will be, for a whole training."""
    masks = {}
    for name, axes in record.kept.items():
        keep = torch.ones_like(tensors_by_name(model)[name])
        for axis, kept in axes.items():
            gone = torch.ones(keep.shape[axis], dtype=torch.bool).index_fill_(0, kept, False)
            keep.index_fill_(axis, gone.nonzero().flatten(), 0.0)
        masks[name] = keep
    return masks


@pytest.mark.parametrize("name", list(NETS))
def test_half_of_the_channels_go_and_all_layers_still_fit(name: str) -> None:
    model, x = build(name)
    record, coupling = planned(model, x)
    small = copy.deepcopy(model)
    identities = [id(p) for p in small.parameters()]
    apply_record(small, record)
    assert identities == [id(p) for p in small.parameters()]
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    num = sum(p.numel() for p in small.parameters())
    assert num == num_parameters(model, record) < 0.75 * sum(p.numel() for p in model.parameters())
    assert small(x).shape == model(x).shape
    assert all("output layer" in reason for reason in coupling.skipped.values())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "concat", "gated"])
def test_training_goes_on_as_that_of_the_masked_dense_model(name: str, optimizer: str) -> None:
    """In train mode, with batch norms that learn: 4 dense steps, then 20 of both."""
    make = {
        "adam": lambda m: torch.optim.Adam(m.parameters(), 1e-3, amsgrad=True),
        "sgd": lambda m: torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3),
    }[optimizer]
    model, x = build(name)
    record, _ = planned(model, x)
    dense, small = model.double().train(), copy.deepcopy(model).double().train()
    x = x.double() if x.is_floating_point() else x
    optimizers = {id(m): make(m) for m in (dense, small)}
    y = torch.arange(4)

    def step(m: nn.Module, masks: dict[str, Tensor]) -> float:
        optimizers[id(m)].zero_grad()
        loss = F.cross_entropy(m(x), y)
        loss.backward()
        optimizers[id(m)].step()
        for key, keep in masks.items():
            tensors_by_name(m)[key].data.mul_(keep)
        return float(loss)

    for _ in range(4):
        assert step(dense, {}) == step(small, {})
    masks = mask(dense, record)
    for key, keep in masks.items():
        tensors_by_name(dense)[key].data.mul_(keep)
    apply_record(small, record, [optimizers[id(small)]])
    losses = [(step(dense, masks), step(small, {})) for _ in range(20)]
    assert max(abs(a - b) for a, b in losses) <= 1e-5
    assert losses[0][0] != losses[-1][0]


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "concat", "vit", "bert"])
def test_the_same_channels_removed_by_torch_pruning_itself_give_the_same_bits(name: str) -> None:
    """Group by group: ours, computed from the dependency graph, and group.prune()."""
    model, x = build(name)
    coupling = groups_of(model, x)
    for group in coupling.groups:
        drops = drop_lowest([group], {group.name: torch.arange(len(group.sizes)).flip(0).float()}, 0.5, Limits())
        record = record_of(model, [group], drops)
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        apply_record(ours, record)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tp.DependencyGraph().build_dependency(theirs, x)
        root = theirs.get_submodule(group.layers[0])
        first = next(
            p
            for p in group.places
            if p.name.startswith(f"{group.layers[0]}.") and p.axis == (name == "bert" and "word" in p.name)
        )
        gone = first.positions[drops[group.name][first.atoms]].unique().tolist()
        pruner = graph.get_pruner_of_module(root)
        graph.get_pruning_group(root, pruner.prune_out_channels, gone).prune()
        expected = theirs.state_dict()
        assert expected.keys() == ours.state_dict().keys()
        for key, value in ours.state_dict().items():
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "rmsprop", "amsgrad", "lion"])
def test_optimizer_state_is_cut_like_the_weights(kind: str) -> None:
    class Lion(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 1e-3) -> None:
            super().__init__(params, {"lr": lr})

        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                m.mul_(0.9).add_(p.grad, alpha=0.1)

    model, x = build("mobilenet")
    params = list(model.parameters())
    optimizer = {
        "sgd": lambda: torch.optim.SGD(params, 0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(params),
        "adamw": lambda: torch.optim.AdamW(params),
        "rmsprop": lambda: torch.optim.RMSprop(params, momentum=0.9, centered=True),
        "amsgrad": lambda: torch.optim.Adam(params, amsgrad=True),
        "lion": lambda: Lion(params),
    }[kind]()
    assert check_optimizer("ChannelPruning", optimizer) == []
    model(x).square().mean().backward()
    optimizer.step()
    record, _ = planned(model, x)
    names = {id(p): name for name, p in model.named_parameters()}
    before = {names[id(p)]: dict(state) for p, state in optimizer.state.items()}
    gradients = {names[id(p)]: p.grad for p in params}
    apply_record(model, record, [optimizer])
    cut = 0
    for p, state in optimizer.state.items():
        axes = record.kept.get(names[id(p)], {})
        for key, value in [*state.items(), ("grad", p.grad)]:
            expected = gradients[names[id(p)]] if key == "grad" else before[names[id(p)]][key]
            if isinstance(value, Tensor) and value.dim():
                for axis, keep in axes.items():
                    expected = expected[(slice(None),) * axis + (keep,)]
                    cut += 1
                assert torch.equal(value, expected)
                assert value.shape == p.shape
    assert cut > 10
    model(x).square().mean().backward()
    optimizer.step()


UNSAFE: dict[str, tuple[Any, torch.Size, dict[str, str]]] = {
    "lstm": (lambda: Recurrent(nn.LSTM), torch.Size([2, 2, 12]), {"net": "LSTM is left whole", "b": "net"}),
    "gru": (lambda: Recurrent(nn.GRU), torch.Size([2, 2, 12]), {"net": "GRU is left whole", "b": ""}),
    "rnn": (lambda: Recurrent(nn.RNN), torch.Size([2, 2, 12]), {"net": "RNN is left whole", "b": ""}),
    "no_grad and unused": (
        Detached,
        ROWS,
        {"unused": "not reached", "b": "forward fails", "c": "an output layer"},
    ),
}


@pytest.mark.parametrize("kind", list(UNSAFE))
def test_what_is_not_safe_is_left_alone_with_its_reason(kind: str) -> None:
    make, shape, expected = UNSAFE[kind]
    torch.manual_seed(0)
    model, x = make().eval(), inputs_for(shape)
    coupling = groups_of(model, x)
    for name, reason in expected.items():
        assert reason in coupling.skipped[name], coupling.skipped
    taken = {layer for group in coupling.groups for layer in group.layers}
    assert taken.isdisjoint(expected)
    if coupling.groups:
        record, _ = planned(model, x)
        small = copy.deepcopy(model)
        apply_record(small, record)
        assert small(x).shape == model(x).shape
        assert all(small.get_submodule(n).weight.shape[0] for n in taken)


FOLLOWED: dict[str, tuple[Any, torch.Size, set[str]]] = {
    "concat + grouped": (lambda: Concat(4), IMAGES, {"a", "b", "c"}),
    "pixel shuffle": (Shuffle, IMAGES, {"a", "b"}),
    "raw parameter": (Raw, ROWS, {"a", "raw"}),
    "no_grad": (Detached, ROWS, {"stem", "a"}),
}


@pytest.mark.parametrize("kind", list(FOLLOWED))
def test_what_no_layer_shows_is_followed(kind: str) -> None:
    make, shape, expected = FOLLOWED[kind]
    torch.manual_seed(0)
    model, x = make().eval(), inputs_for(shape)
    before = {name: p.numel() for name, p in model.named_parameters()}
    record, coupling = planned(model, x)
    assert {layer for group in coupling.groups for layer in group.layers} == expected
    apply_record(model, record)
    model(x)
    for name, p in model.named_parameters():
        if name.partition(".")[0] in expected:
            assert p.numel() < before[name], name


def test_frozen_parametrized_and_torn_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    nn.utils.parametrizations.weight_norm(model[2])
    coupling = groups_of(model, inputs_for(ROWS))
    assert "is frozen" in coupling.skipped["0"]
    assert sorted(group.layers for group in coupling.groups) == [["2"], ["4"]]
    apply_record(model, planned(model, inputs_for(ROWS))[0])
    assert model[2].weight.shape == (model[2].out_features, 8)
    assert model[2].out_features < 8
    torn = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    torn[2].weight = torn[0].weight
    skipped = groups_of(torn, inputs_for(ROWS)).skipped
    assert skipped["0"] == skipped["2"] == "coupled with the model's input"


def test_norms_over_channels_shrink_with_them() -> None:
    for norm in (nn.RMSNorm(8), nn.LayerNorm(8, bias=False), nn.LayerNorm(8)):
        model = nn.Sequential(nn.Linear(8, 8), norm, nn.GELU(), nn.Linear(8, 3)).eval()
        apply_record(model, planned(model, inputs_for(ROWS))[0])
        assert model[1].normalized_shape == (4,)
        assert model[1].weight.shape == (4,)


def test_include_and_exclude() -> None:
    model, x = build("resnet")
    coupling = groups_of(model, x, include=["1"], exclude=["1.conv1"])
    assert coupling.skipped["1.conv1"] == "excluded by name"
    assert coupling.skipped["2.conv1"] == "not included by name"
    assert [group.layers for group in coupling.groups] == [["0", "1.conv2"]]
    with pytest.raises(ValueError, match="include='x' matches no layer"):
        groups_of(model, x, include=["x"])


@pytest.mark.parametrize("name", ["vit", "bert", "mha"])
def test_whole_heads_go(name: str) -> None:
    model, x = build(name)
    record, _ = planned(model, x, 0.6)
    small = copy.deepcopy(model)
    apply_record(small, record)
    heads = set()
    for module in small.modules():
        if isinstance(module, nn.MultiheadAttention):
            heads.add(module.num_heads)
            assert module.embed_dim == module.num_heads * 8 == module.in_proj_weight.shape[0] // 3
        elif hasattr(module, "num_attention_heads"):
            heads.add(module.num_attention_heads)
            assert module.all_head_size == module.num_attention_heads * 8 == module.query.out_features
        elif hasattr(module, "qkv"):
            heads.add(module.num_heads)
            assert module.qkv.out_features == 3 * 8 * module.num_heads == 3 * module.proj.in_features
    assert min(heads) < 4


def test_heads_are_found_whatever_the_attribute_is_called() -> None:
    torch.manual_seed(0)
    model, x = build("vit")
    for block in model.blocks:
        block.attn.count = block.attn.__dict__.pop("num_heads")
        type(block.attn).num_heads = property(lambda self: self.count)
    try:
        record, coupling = planned(model, x, 0.6)
        assert "blocks.0.attn.qkv" not in coupling.skipped
        apply_record(model, record)
        assert model(x).shape == (4, 10)
        assert min(block.attn.count for block in model.blocks) < 4
    finally:
        del type(model.blocks[0].attn).num_heads


def test_a_proof_fails_where_shapes_alone_would_not_tell() -> None:
    """Kept indices that are off by one fit everywhere and compute something else."""
    model, x = build("mobilenet")
    groups = groups_of(model, x).groups
    drops = drop_lowest(groups, score_groups(groups, scores_of(model)), 0.5, Limits())
    record = record_of(model, groups, drops)
    assert prove(model, lambda m: m(x), groups, drops) is None
    name = next(n for n, axes in record.kept.items() if 1 in axes)
    kept = record.kept[name][1]
    record.kept[name][1] = (kept + 1) % tensors_by_name(model)[name].shape[1]
    assert "something else" in str(prove(model, lambda m: m(x), groups, drops, record))


def test_floor_rounding_and_scope() -> None:
    model, x = build("resnet")
    coupling = groups_of(model, x)
    scores = score_groups(coupling.groups, scores_of(model))
    for limits in (Limits(floor=0.5), Limits(round_to=4), Limits(scope="local")):
        drops, _ = drop_fewest(coupling.groups, scores, limits, lambda drops: False)
        for group in coupling.groups:
            left = int(group.sizes[~drops[group.name]].sum())
            assert left >= max(1, limits.floor * int(group.sizes.sum()))
            assert left % limits.round_to == 0
    drops = drop_lowest(coupling.groups, scores, 0.25, Limits(scope="local"))
    assert {float(drops[group.name].float().mean()) for group in coupling.groups} == {0.25}


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "plain"])
def test_what_the_last_step_takes_beyond_the_target_is_given_back(name: str, round_to: int) -> None:
    """Layers of one width lose a channel each at the same ratio, though some of them could keep theirs."""
    model, x = build(name) if name != "plain" else (nn.Sequential(*(nn.Linear(24, 24) for _ in range(5))), None)
    x = torch.randn(2, 24) if x is None else x
    groups = groups_of(model, x).groups
    scores = score_groups(groups, scores_of(model))
    limits = Limits(scope="local", round_to=round_to)
    whole = sum(p.numel() for p in model.parameters())

    def share(drops: dict[str, Tensor]) -> float:
        return num_parameters(model, record_of(model, groups, drops)) / whole

    drops, enough = drop_fewest(groups, scores, limits, lambda drops: share(drops) <= 0.52)
    grid = [share(drop_lowest(groups, scores, i / 400, limits)) for i in range(401)]
    at_one_ratio = max(found for found in grid if found <= 0.52)
    assert enough
    assert at_one_ratio <= share(drops) <= 0.52
    if name == "plain":
        assert at_one_ratio < share(drops)


def separable(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3)]
    for before, width in pairwise(widths):
        layers += [nn.Conv2d(before, before, 3, padding=1, groups=before), nn.ReLU(), nn.Conv2d(before, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 2))


def test_depthwise_convolutions_lose_channels_in_fours_unless_told_otherwise() -> None:
    model, x = separable(40, 8, 24, 24), torch.randn(2, 3, 8, 8)
    groups = groups_of(model, x).groups
    scores = score_groups(groups, scores_of(model))
    # of few channels three more would be many, and ordinary convolutions are as fast with any number
    assert [(int(group.sizes.sum()), group.block) for group in groups] == [(40, 4), (8, 1), (24, 4), (24, 1)]

    def left(limits: Limits) -> list[int]:
        drops = drop_lowest(groups, scores, 0.45, limits)
        return [num_channels([group], drops) for group in groups]

    assert left(Limits(scope="local", round_to=None)) == [24, 5, 16, 14]
    assert left(Limits(scope="local", round_to=1)) == [22, 5, 14, 14]
    # a share of its own is taken as it is
    assert left(Limits(round_to=None, shares=dict.fromkeys(scores, 1.0))) == [22, 5, 14, 14]


def test_masks_follow() -> None:
    model, x = build("resnet")
    layers, _ = find_layers(model)
    masks = Masks(layers)
    masks.update(Magnitude(), Element(), 0.5, "global")
    record, _ = planned(model, x)
    apply_record(model, record)
    masks.follow(model, record)
    masks.enforce(layers)
    state = masks.state_dict()
    assert all(state[layer.name]["shape"] == list(layer.weight.shape) for layer in layers)
    assert all(bool((layer.weight[masks._masks[layer.name] == 0] == 0).all()) for layer in layers)
    gone = record_blocks(["3"])
    apply_record(model, gone)
    masks.follow(model, gone)
    masks.enforce(layers)
    assert not any(name.startswith("3.") for name in masks.state_dict())


@pytest.mark.parametrize("name", list(NETS))
def test_structure_is_restored_in_both_directions(name: str) -> None:
    dense, x = build(name)
    small, middle = copy.deepcopy(dense), copy.deepcopy(dense)
    apply_record(middle, planned(middle, x, 0.3)[0])
    apply_record(small, planned(small, x, 0.3)[0])
    apply_record(small, planned(small, x, 0.3)[0])
    fresh, _ = build(name)
    for model in (small, middle, dense, small, dense, middle):
        structure = torch.utils._pytree.tree_map(lambda v: v, structure_of(model))
        restore_structure(fresh, structure, model.state_dict())
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), model(x))
        assert structure_of(fresh) == structure_of(model)


def test_blocks() -> None:
    model, x = build("resnet")
    names, skipped = find_blocks(model, lambda m: m(x))
    assert names == ["1", "2.conv2", "3"]
    assert not skipped
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    scores = {name: score_block(model, name, scores_of(model)) for name in names}
    chosen = choose_blocks(model, lambda m: m(x), names, scores, 1)
    assert chosen == [min(names, key=lambda name: scores[name])]
    twin = copy.deepcopy(model)
    apply_record(model, record_blocks(chosen), [optimizer], copies=[twin])
    left = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == left
    assert {id(p) for p in optimizer.state} == left
    assert torch.equal(twin(x), model(x))
    assert structure_of(model)["removed"] == chosen
    dense, _ = build("resnet")
    restore_structure(model, {}, dense.state_dict())
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model(x), dense(x))


class Hourglass(nn.Module):
    """A U-Net in small: one block that gives back the shape it reads holds nearly all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.net(x))


def test_a_block_that_is_most_of_the_network_stays() -> None:
    model, x = Hourglass(), torch.randn(2, 4)
    names, skipped = find_blocks(model, lambda m: m(x))
    assert names == ["stem"]
    num = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p in model.net.parameters()) / num
    assert f"it holds {share:.0%} of the model's parameters, and a block may hold up to 50%" in skipped["net"]
    # the block inside of it holds more than half, too
    assert "max_share" in skipped["net.1.0"]
    names, _ = find_blocks(model, lambda m: m(x), max_share=0.75)
    assert names == ["stem", "net.1.0"]
    names, _ = find_blocks(model, lambda m: m(x), max_share=1.0)
    assert names == ["stem", "net"]


def test_what_a_block_shares_with_the_rest_is_not_freed() -> None:
    model, x = Hourglass(), torch.randn(2, 4)
    model.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model.net[1].weight = model.stem.weight
    assert freed(model, "net") == 3 * 4 + 2 * 16
    assert freed(model, "net.1") == 4
    assert freed(model, "stem") == 4
    assert find_blocks(model, lambda m: m(x), max_share=0.55)[0] == ["stem", "net.0", "net.1", "net.2"]


def test_blocks_of_transformers_are_layers_and_not_their_parts() -> None:
    model, x = build("vit")
    assert find_blocks(model, lambda m: m(x))[0] == ["blocks.0", "blocks.1"]
    assert find_blocks(model, lambda m: m(x), include=["blocks.*.mlp"])[0] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert find_blocks(model, lambda m: m(x), exclude=["blocks.0"])[0] == ["blocks.1"]
    model, x = build("mobilenet")
    assert find_blocks(model, lambda m: m(x))[0] == ["3", "5"]


def test_what_is_not_settled_in_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("resnet")
    passing = {group.name for group in groups_of(model, x).groups}
    monkeypatch.setattr("lightning_compress.structure.proof._SECONDS", 0)
    # one trial of all is always made: where it passes, nothing is left to settle
    assert {group.name for group in groups_of(model, x).groups} == passing
    coupling = couple(copy.deepcopy(model), lambda m: m(x))
    coupling = prove_groups(model, lambda m: m(x), coupling, Limits(), lambda _: "it does not run")
    assert not coupling.groups
    assert "not settled within 0 seconds of planning" in coupling.skipped.values()
