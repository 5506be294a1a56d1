"""Public contract checks: prove a criterion, pattern, quantizer or observer of your own in one line of your tests."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers import Layer
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.observation import Observation
from lightning_compress.pruning.patterns import Pattern
from lightning_compress.quantization.observers import Observer
from lightning_compress.quantization.quantizers import Affine, QParams, Quantizer, extent

__all__ = ["check_criterion", "check_observer", "check_pattern", "check_quantizer"]

_SHAPES = ((16, 32), (16, 16, 3, 3), (48, 24), (24, 48, 8))
# with 0 inside, at an end, outside; narrow, wide, empty
_RANGES = (
    *((-1.0, 1.0), (-0.3, 2.7), (-127.0, 128.0), (-2e-3, 1e-3), (-1e4, 3e4)),
    *((0.0, 6.0), (-3.0, 0.0), (1.0, 3.0), (-5.0, -2.0), (0.0, 1e-6), (0.0, 0.0), (0.7, 0.7), (-0.7, -0.7)),
)


def check_criterion(criterion: Criterion) -> None:
    """Check that a criterion keeps the contract of :class:`lightning_compress.pruning.Criterion`.

    For the weights of linear, convolution, transposed convolution and LSTM layers that it does not refuse, also where
    some or all weights are zero, the scores are finite, in the weight's shape and the same when asked twice; the
    weight, its gradient and the global random state stay as they are.

    A criterion that observes does so first, over some training steps, with and without a batch norm and an activation
    function behind the layer: what it observes is finite, of one shape whatever the size of the batch, and changes
    neither inputs nor outputs nor gradients.

    Args:
        criterion: The criterion to check.

    Raises:
        AssertionError: If the criterion breaks the contract; the message says what is broken.

    Example:
        >>> from lightning_compress.pruning import Magnitude
        >>> check_criterion(Magnitude())
    """
    name = type(criterion).__name__
    _require(isinstance(criterion, Criterion), f"{name} is no subclass of lightning_compress.pruning.Criterion")
    both = criterion.observes_activations and criterion.observes_gradients
    _require(not both, f"{name} overrides observe and observe_gradient; accepted is one of them")
    num_scored = 0
    for layer in _layers():
        weight = layer.weight
        for kind, share in (("", 0.0), (" with half of the weights zero", 0.5), (" with all weights zero", 1.0)):
            where = f"for a {type(layer.module).__name__}'s {layer.parameter} of shape {tuple(weight.shape)}{kind}"
            if _refuses(f"{name}.refuses {where}", criterion.refuses, layer):
                continue
            weight.data = _noise(weight.shape, seed=1) * (_noise(weight.shape, seed=2, uniform=True) >= share)
            seen = _observe(criterion, layer, where)
            if seen is not None:
                num_scored += 1
                _check_scores(criterion, seen, where)
    _require(num_scored, f"{name} refuses every layer, or sees nothing of any")


def _check_scores(criterion: Criterion, layer: Layer, where: str) -> None:
    name, weight = type(criterion).__name__, layer.weight
    weight.grad = _noise(weight.shape, seed=3)
    kept = {"weight": weight.detach(), "weight's gradient": weight.grad, "layer's seen": layer.seen}
    before = {key: None if value is None else value.clone() for key, value in kept.items()}
    grad, rng = weight.grad, _random_states()
    with _attempt(f"{name}.score {where}"):
        first, second = criterion.score(layer), criterion.score(layer)
    _require(isinstance(first, Tensor), f"{name}.score gives a {type(first).__name__}, not a tensor, {where}")
    _require(
        first.shape == weight.shape,
        f"{name}.score gives the shape {tuple(first.shape)}, not the weight's, {where}",
    )
    _require(bool(torch.isfinite(first).all()), f"{name}.score is not finite {where}")
    _require(torch.equal(first, second), f"{name}.score is not the same when asked twice {where}")
    for key, value in kept.items():
        _require(_same(value, before[key]), f"{name}.score changed the {key} {where}")
    _require(weight.grad is grad, f"{name}.score changed the weight's gradient {where}")
    untouched = _same(rng, _random_states())
    _require(untouched, f"{name}.score drew from the global random state; give it a torch.Generator")


class _Trained(nn.Module):
    """A layer with a batch norm and an activation function behind it, or with neither."""

    norm: nn.Module
    shape: tuple[int, ...]  # of one input

    def __init__(self, module: nn.Module, bare: bool) -> None:
        super().__init__()
        self.module, self.bare, self.norm, self.shape = module, bare, nn.Identity(), (2, 4)
        if isinstance(module, nn.Linear):
            self.norm, self.shape = nn.BatchNorm1d(module.out_features), (module.in_features,)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            self.norm, self.shape = nn.BatchNorm2d(module.out_channels), (module.in_channels, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        y = y[0] if isinstance(y, tuple) else y
        return y if self.bare else self.norm(y).relu()


def _observe(criterion: Criterion, layer: Layer, where: str) -> Layer | None:
    """The layer with what the criterion saw of it in some steps of training; None where it sees nothing."""
    if not (criterion.observes_activations or criterion.observes_gradients or criterion.needs_norm):
        return layer
    name, seen = type(criterion).__name__, None
    method = f"{name}.observe_gradient" if criterion.observes_gradients else f"{name}.observe"
    for bare in (False,) if criterion.needs_norm else (True, False):
        model = _Trained(layer.module, bare).train()
        plain = copy.deepcopy(model)
        observation, optimizer = Observation(criterion, [layer], model), torch.optim.SGD(model.parameters(), 0.0)
        shapes, rng = set(), _random_states()
        with ExitStack() as stack:
            stack.callback(observation.cancel)  # its hooks, whatever happens
            for seed, size in enumerate((4, 7, 2, 5)):
                x = _noise((size, *model.shape), seed)
                ours, theirs = x.clone(), plain(x)
                pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
                for parameter in (p for pair in pairs for p in pair):
                    parameter.grad = None
                with _attempt(f"{method} {where}"):
                    observation.begin_batch()
                    output = model(ours)
                _require(_same(ours, x), f"{method} changed the layer's inputs {where}")
                _require(_same(output, theirs), f"{method} changed the layer's outputs {where}")
                _require(all(_same(a, b) for a, b in pairs), f"{method} changed a weight {where}")
                for y in (output, theirs):
                    y.square().sum().backward()
                with _attempt(f"{method} {where}"):
                    observation.observe_gradients(optimizer)
                _require(all(_same(a, b) for a, b in pairs), f"{method} changed a weight {where}")
                _require(all(_same(a.grad, b.grad) for a, b in pairs), f"{method} changed a gradient {where}")
                for found in observation.state_dict()["batch"].get(layer.name, []):
                    _require(
                        isinstance(found, Tensor), f"{method} gives a {type(found).__name__}, not a tensor, {where}"
                    )
                    _require(bool(torch.isfinite(found).all()), f"{method} is not finite {where}")
                    _require(not found.requires_grad, f"{method} gives a tensor that holds on to its graph {where}")
                    shapes.add(tuple(found.shape))
                _require(len(shapes) <= 1, f"{method} gives another shape in every batch, {sorted(shapes)}, {where}")
                observation.end_batch()
        _require(_same(rng, _random_states()), f"{method} drew from the global random state; give it a torch.Generator")
        seen = None if observation.refuses(layer) else observation.layer(layer)
    return seen


def check_pattern(pattern: Pattern) -> None:
    """Check that a pattern keeps the contract of :class:`lightning_compress.pruning.Pattern`.

    For weights of two, three and four axes that it does not refuse, ``expand`` gives a bool a weight in the weight's
    shape; its groups are of one size and share no weight; and ``reduce`` gives the group that ``expand`` keeps the
    highest score, and a group of dropped weights, whose scores are -inf, the lowest. ``protects`` gives a bool a group,
    and leaves enough of them to reach ``max_sparsity``; where that is below 1, it protects some.

    Args:
        pattern: The pattern to check.

    Raises:
        AssertionError: If the pattern breaks the contract; the message says what is broken.

    Example:
        >>> from lightning_compress.pruning import Element
        >>> check_pattern(Element())
    """
    name = type(pattern).__name__
    _require(isinstance(pattern, Pattern), f"{name} is no subclass of lightning_compress.pruning.Pattern")
    with _attempt(f"{name}.max_sparsity"):
        most = float(pattern.max_sparsity)
    _require(0 < most <= 1, f"{name}.max_sparsity is {most:g}; accepted is a share above 0 and up to 1")
    num_accepted = 0
    for size in _SHAPES:
        shape, where = torch.Size(size), f"for a weight of shape {size}"
        if _refuses(f"{name}.refuses {where}", pattern.refuses, shape):
            continue
        num_accepted += 1

        def reduce(scores: Tensor, where: str = where) -> Tensor:
            before = scores.clone()
            with _attempt(f"{name}.reduce {where}"):
                groups = pattern.reduce(scores)
            _require(torch.equal(scores, before), f"{name}.reduce changed the scores {where}")
            return groups

        def expand(keep: Tensor, shape: torch.Size = shape, where: str = where) -> Tensor:
            with _attempt(f"{name}.expand {where}"):
                mask = pattern.expand(keep, shape)
            _require(mask.dtype == torch.bool, f"{name}.expand gives {mask.dtype}, not torch.bool, {where}")
            _require(
                mask.shape == shape, f"{name}.expand gives the shape {tuple(mask.shape)}, not the weight's, {where}"
            )
            return mask

        scores = _noise(shape, seed=1, uniform=True)
        groups = reduce(scores)
        num_groups, num_weights = groups.numel(), scores.numel()
        _require(bool(torch.isfinite(groups).all()), f"{name}.reduce is not finite {where}")
        _require(
            0 < num_groups <= num_weights and num_weights % num_groups == 0,
            f"{name}.reduce gives {num_groups} groups, which cannot be of one size, {where}",
        )
        everything = torch.ones(groups.shape, dtype=torch.bool)
        _require(bool(expand(everything).all()), f"{name}.expand drops weights when all groups are kept {where}")
        _require(not expand(~everything).any(), f"{name}.expand keeps weights when all groups are dropped {where}")
        for seed in range(3):
            keep = _noise(groups.shape, seed=seed, uniform=True) < 0.5
            mask = expand(keep)
            _require(torch.equal(mask, ~expand(~keep)), f"{name}.expand's groups share weights {where}")
            _require(
                int(mask.sum()) == int(keep.sum()) * (num_weights // num_groups),
                f"{name}.expand's groups are not of one size {where}: {int(keep.sum())} of {num_groups} groups keep "
                f"{int(mask.sum())} of {num_weights} weights",
            )
        for index in {0, num_groups // 3, num_groups - 1}:
            keep = torch.zeros(num_groups, dtype=torch.bool)
            keep[index] = True
            mask = expand(keep.view(groups.shape))
            _require(
                int(reduce(mask.float()).flatten().argmax()) == index,
                f"{name}.reduce and {name}.expand disagree on which weights are group {index} {where}",
            )
            dead = reduce(scores.masked_fill(mask, -torch.inf)).flatten()
            _require(
                not dead.isnan().any() and int(dead.argmin()) == index,
                f"{name}.reduce does not rank a group of dropped weights, whose scores are -inf, lowest {where}",
            )
        _check_protects(pattern, groups, most, where)
    _require(num_accepted, f"{name}.refuses refuses all of the shapes {', '.join(map(str, _SHAPES))}")


def _check_protects(pattern: Pattern, groups: Tensor, most: float, where: str) -> None:
    name, before = type(pattern).__name__, groups.clone()
    with _attempt(f"{name}.protects {where}"):
        protected = pattern.protects(groups)
    _require(torch.equal(groups, before), f"{name}.protects changed the scores {where}")
    some = protected is not None and bool(protected.any())
    _require(
        some or most == 1, f"{name}.protects protects no group, though max_sparsity is {most:g} and not 1, {where}"
    )
    if protected is None:
        return
    _require(protected.dtype == torch.bool, f"{name}.protects gives {protected.dtype}, not torch.bool, {where}")
    _require(
        protected.shape == groups.shape,
        f"{name}.protects gives the shape {tuple(protected.shape)}, not that of reduce's groups, {where}",
    )
    free = 1 - float(protected.float().mean())
    _require(
        free > most - 1e-6,
        f"{name}.protects leaves a share of {free:g} to drop, less than max_sparsity={most:g}, {where}",
    )


def check_quantizer(quantizer: Quantizer) -> None:
    """Check that a quantizer keeps the contract of :class:`lightning_compress.quantization.Quantizer`.

    For ranges with 0 inside, at an end or outside of them, narrow, wide and empty, one for a tensor or one a channel of
    axis 0 or 1: 0 stays exactly 0; codes are whole numbers, no more than ``num_codes`` different ones; what was
    quantized once does not change when quantized again; larger values do not become smaller ones (an affine quantizer
    errs by one step at most inside the range); ``fake_quantize`` gives what ``dequantize(quantize(x))`` gives, with a
    gradient that is finite, and straight-through between the lowest and the highest value that a code stands for.

    ``fit`` gives parameters for normal, heavy-tailed, mostly zero, constant and no values other than 0: those that
    ``learned`` names are positive, it changes nothing and gives the same when asked twice, and what they make of the
    values is nearer to them than zeros are. With values of twice the range each learned parameter has a gradient that
    is finite and not 0.

    Args:
        quantizer: The quantizer to check.

    Raises:
        AssertionError: If the quantizer breaks the contract; the message says what is broken.

    Example:
        >>> check_quantizer(Affine(bits=8, symmetric=True))
    """
    name = type(quantizer).__name__
    _require(isinstance(quantizer, Quantizer), f"{name} is no subclass of lightning_compress.quantization.Quantizer")
    bits = getattr(quantizer, "bits", None)
    _require(isinstance(bits, int) and bits > 0, f"{name}.bits is {bits!r}, not a whole number above 0")
    probes = []
    for low, high in _RANGES:
        where = f"for the range {low:g}..{high:g}"
        qparams = _qparams(quantizer, torch.tensor(low), torch.tensor(high), None, where)
        probes.append(_probe(quantizer, qparams, low, high, where))
    rows = torch.nn.utils.rnn.pad_sequence(probes, batch_first=True).sort(dim=1).values
    lows, highs = torch.tensor(_RANGES).unbind(1)
    alone = []
    for row, low, high in zip(rows, lows, highs, strict=True):
        where = f"for the range {low:g}..{high:g}"
        alone.append(_check_values(quantizer, row[None], low[None], high[None], None, where))
    for axis in (0, 1):
        where = f"for one range a channel of axis {axis}"
        together = _check_values(quantizer, rows, lows, highs, axis, where)
        _require(
            _close(together, torch.cat(alone), rows),
            f"{name} gives a channel other values than the same range for a tensor {where}",
        )
    _check_fit(quantizer)


def _check_fit(quantizer: Quantizer) -> None:
    name, normal = type(quantizer).__name__, _noise((24, 32), seed=5)
    samples = {
        "normal values": normal,
        "heavy-tailed values": normal**5,
        "values that are mostly zero": normal * (_noise(normal.shape, seed=6, uniform=True) > 0.9),
        "one value": torch.full_like(normal, 0.7),
        "one negative value": torch.full_like(normal, -0.7),
        "zeros": torch.zeros_like(normal),
    }
    for (kind, x), axis in itertools.product(samples.items(), (None, 0, 1)):
        where = f"for {kind} with {'one scale' if axis is None else f'one scale a channel of axis {axis}'}"
        before = x.clone()
        with _attempt(f"{name}.fit {where}"):
            qparams, again = quantizer.fit(x, axis), quantizer.fit(x, axis)
        _require(torch.equal(x, before), f"{name}.fit changed its input {where}")
        _require(isinstance(qparams, QParams), f"{name}.fit gives a {type(qparams).__name__}, not QParams, {where}")
        _require(_same(tuple(qparams), tuple(again)), f"{name}.fit is not the same when asked twice {where}")
        for field in quantizer.learned:
            value = getattr(qparams, field)
            _require(isinstance(value, Tensor), f"{name}.fit gives no {field}, which is learned, {where}")
            valid = bool((torch.isfinite(value) & (value > 0)).all())
            _require(valid, f"{name}.fit gives a {field}, which is learned, that is not positive and finite {where}")
        with _attempt(f"{name}.dequantize(quantize(x)) {where}"):
            values = quantizer.dequantize(quantizer.quantize(x, qparams), qparams)
        error, most = (values - x).square().sum(), x.square().sum()
        _require(bool(error <= most), f"{name}.fit makes of the values something farther from them than 0 {where}")
        if kind == "normal values" and quantizer.learned:
            leaves = [getattr(qparams, field).clone().requires_grad_() for field in quantizer.learned]
            with torch.enable_grad(), _attempt(f"{name}.fake_quantize {where}"):
                learned = dict(zip(quantizer.learned, leaves, strict=True))
                faked = quantizer.fake_quantize(2 * x, qparams._replace(**learned))
                gradients = torch.autograd.grad(faked, leaves, _noise(x.shape, seed=7))
            for field, gradient in zip(quantizer.learned, gradients, strict=True):
                moved = bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())
                _require(moved, f"{name}.fake_quantize gives {field} a gradient that is 0 or not finite {where}")


def check_observer(observer: Observer) -> None:
    """Check that an observer keeps the contract of :class:`lightning_compress.quantization.Observer`.

    A state is a float tensor of one axis and one size that ``update`` gives anew, the same when asked twice, and leaves
    as it is for no values. The range for a quantizer is (+inf, -inf) before anything was seen; then it lies within what
    was seen, low not above high. A state merged with one that has seen nothing gives the range that it gave, and
    merged ranks give the same range in any order.

    Args:
        observer: The observer to check.

    Raises:
        AssertionError: If the observer breaks the contract; the message says what is broken.

    Example:
        >>> from lightning_compress.quantization import MinMax
        >>> check_observer(MinMax())
    """
    name = type(observer).__name__
    _require(isinstance(observer, Observer), f"{name} is no subclass of lightning_compress.quantization.Observer")
    normal = _noise((8, 64), seed=8)
    batches = [normal[0] * 1e-3, normal[1], normal[2:6].relu(), normal[6] ** 5 - 3, torch.zeros(4), normal[7] + 2]
    kinds = {"mixed": batches, "rectified": [b.relu() for b in batches], "zero": [torch.zeros(3)]}
    with _attempt(f"{name}.start"):
        start = observer.start()
    _require(isinstance(start, Tensor) and start.dim() == 1, f"{name}.start gives no tensor of one axis")
    for (kind, batches), quantizer in itertools.product(kinds.items(), (Affine(4), Affine(8, symmetric=True))):
        where = f"for {kind} values and {quantizer}"

        def chosen(state: Tensor, quantizer: Quantizer = quantizer, where: str = where) -> list[float]:
            before = state.clone()
            with _attempt(f"{name}.range {where}"):
                found = observer.range(state, quantizer)
            _require(found.shape == (2,), f"{name}.range gives the shape {tuple(found.shape)}, not (2,), {where}")
            _require(torch.equal(state, before), f"{name}.range changed the state {where}")
            return found.tolist()

        _require(chosen(start)[0] > chosen(start)[1], f"{name}.range gives a range though nothing was seen {where}")
        states, state = [start], start
        for values in batches:
            kept, before = values.clone(), state.clone()
            with _attempt(f"{name}.update {where}"):
                new, again = observer.update(state, values), observer.update(state, values)
                same = observer.update(state, values[:0])
            _require(torch.equal(values, kept), f"{name}.update changed the values {where}")
            _require(torch.equal(state, before), f"{name}.update changed the state before {where}")
            _require(torch.equal(new, again), f"{name}.update is not the same when asked twice {where}")
            _require(torch.equal(same, state), f"{name}.update changed the state for no values {where}")
            fits = new.shape == start.shape and new.dtype == start.dtype
            _require(fits, f"{name}.update gives a state of another shape or type {where}")
            state = new
            states.append(state)
        low, high = chosen(state)
        least, most = (float(end) for end in extent(torch.cat([b.flatten() for b in batches]), None))
        _require(
            least <= low <= high <= most, f"{name}.range is {low:g}..{high:g}, seen was {least:g}..{most:g} {where}"
        )
        with _attempt(f"{name}.merge {where}"):
            alone = observer.merge(torch.stack([start, state]))
            merged, turned = observer.merge(torch.stack(states)), observer.merge(torch.stack(states[::-1]))
        _require(chosen(alone) == [low, high], f"{name}.merge with nothing seen changes the range {where}")
        _require(chosen(merged) == chosen(turned), f"{name}.merge depends on the order of the ranks {where}")


def _check_values(
    quantizer: Quantizer, rows: Tensor, low: Tensor, high: Tensor, axis: int | None, where: str
) -> Tensor:
    """Check ascending rows of values, each with its own range; gives what the values became, row by row."""
    name, turn = type(quantizer).__name__, _turn(axis)
    x = turn(rows)
    qparams = _qparams(quantizer, *((low, high) if axis is not None else (low[0], high[0])), axis, where)

    def round_trip(x: Tensor) -> tuple[Tensor, Tensor]:
        before = x.clone()
        with _attempt(f"{name}.quantize {where}"):
            codes = quantizer.quantize(x, qparams)
        _require(codes.shape == x.shape, f"{name}.quantize gives the shape {tuple(codes.shape)}, not x's, {where}")
        with _attempt(f"{name}.dequantize {where}"):
            values = quantizer.dequantize(codes, qparams)
        _require(values.shape == x.shape, f"{name}.dequantize gives the shape {tuple(values.shape)}, not x's, {where}")
        _require(torch.equal(x, before), f"{name}.quantize changed its input {where}")
        return codes, values

    zeros = torch.zeros_like(x)
    worst = round_trip(zeros)[1].abs().max()
    _require(bool(worst == 0), f"{name}: dequantize(quantize(0)) is {worst:g} and not 0 {where}")
    with _attempt(f"{name}.fake_quantize {where}"):
        worst = quantizer.fake_quantize(zeros, qparams).abs().max()
    _require(bool(worst == 0), f"{name}: fake_quantize(0) is {worst:g} and not 0 {where}")

    codes, values = (turn(t) for t in round_trip(x))
    _require(bool((codes == codes.round()).all()), f"{name}.quantize gives codes that are no whole numbers {where}")
    most = max(len(row.unique()) for row in codes)
    _require(
        most <= quantizer.num_codes,
        f"{name}.quantize gives {most} different codes {where}; {quantizer.bits} bits hold {quantizer.num_codes}",
    )
    alike = [len(row.unique()) == 1 for row in codes[low < high]]
    _require(not any(alike), f"{name}.quantize gives one and the same code for all values {where}")
    _require(bool(torch.isfinite(values).all()), f"{name}: dequantize(quantize(x)) is not finite {where}")
    falls = values.diff(dim=1) < -_tolerance(rows)
    _require(not falls.any(), f"{name}: dequantize(quantize(x)) falls where x rises {where}")
    again = turn(round_trip(turn(values))[1])
    _require(_close(again, values, rows), f"{name}: quantizing a quantized value again changes it {where}")
    if isinstance(quantizer, Affine):
        inside = (rows >= low.clamp(max=0)[:, None]) & (rows <= high.clamp(min=0)[:, None])
        error = ((values - rows).abs() - qparams.scale.reshape(-1, 1) - _tolerance(rows))[inside]
        _require(not (error > 0).any(), f"{name}: dequantize(quantize(x)) is more than one step from x {where}")

    with torch.enable_grad(), _attempt(f"{name}.fake_quantize {where}"):
        leaf = x.clone().requires_grad_()
        faked = quantizer.fake_quantize(leaf, qparams)
        upstream = _noise(x.shape, seed=4, uniform=True) + 0.5
        (gradient,) = torch.autograd.grad(faked, leaf, upstream)
    faked, gradient = turn(faked.detach()), turn(gradient / upstream)
    if not _close(faked, values, rows):
        index = int((faked - values).abs().argmax())
        at, got, expected = (f"{float(t.flatten()[index]):g}" for t in (rows, faked, values))
        what = f"fake_quantize({at}) is {got}, but dequantize(quantize({at})) is {expected}"
        raise AssertionError(f"{name}: {what} {where}")
    _require(bool(torch.isfinite(gradient).all()), f"{name}.fake_quantize has a gradient that is not finite {where}")
    inside = (rows >= values.amin(1, keepdim=True)) & (rows <= values.amax(1, keepdim=True))
    straight = bool(((gradient[inside] - 1).abs() < 1e-5).all())
    _require(straight, f"{name}.fake_quantize has a gradient that is not straight-through inside the range {where}")
    return values


def _probe(quantizer: Quantizer, qparams: QParams, low: float, high: float, where: str) -> Tensor:
    """Values in and around a range, and those half way between two codes, where rounding shows."""
    margin = 0.25 * (high - low) + 0.01 * max(abs(low), abs(high))
    num = min(4 * 2**quantizer.bits, 2048) + 1
    grid = torch.cat([torch.linspace(low - margin, high + margin, num), torch.linspace(low, high, num)])
    with _attempt(f"{type(quantizer).__name__}.dequantize(quantize(x)) {where}"):
        levels = quantizer.dequantize(quantizer.quantize(grid.clone(), qparams), qparams).unique()
    levels = levels[levels.isfinite()]
    return torch.cat([grid, (levels[1:] + levels[:-1]) / 2])


def _qparams(quantizer: Quantizer, low: Tensor, high: Tensor, axis: int | None, where: str) -> QParams:
    with _attempt(f"{type(quantizer).__name__}.qparams {where}"):
        return quantizer.qparams(low, high, axis)


def _turn(axis: int | None) -> Callable[[Tensor], Tensor]:
    """Rows to a tensor with its channels along an axis, and back."""
    return (lambda t: t.t().contiguous()) if axis == 1 else (lambda t: t)


def _tolerance(rows: Tensor) -> Tensor:
    """What rounding of floats may cost, a row: ``x + (y - x)`` is not y to the last bit."""
    return 1e-6 * rows.abs().amax(1, keepdim=True)


def _close(a: Tensor, b: Tensor, rows: Tensor) -> bool:
    return bool(((a - b).abs() <= _tolerance(rows)).all())


def _layers() -> Iterator[Layer]:
    """Layers whose weights are made without the global random state."""
    kinds: Sequence[tuple[Callable[..., nn.Module], tuple[int, ...], str]] = (
        (nn.Linear, (5, 3), "weight"),
        (nn.Conv2d, (3, 4, 3), "weight"),
        (nn.ConvTranspose2d, (3, 4, 3), "weight"),
        (nn.LSTM, (4, 3), "weight_ih_l0"),
        (nn.LSTM, (4, 3), "weight_hh_l0"),
    )
    for kind, arguments, parameter in kinds:
        with torch.device("meta"):
            module = kind(*arguments)
        module = module.to_empty(device="cpu")
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(_noise(p.shape, seed=0))
        yield Layer(f"{kind.__name__.lower()}.{parameter}", module, parameter)


def _noise(shape: Sequence[int], seed: int, uniform: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand if uniform else torch.randn)(tuple(shape), generator=generator)


def _random_states() -> tuple[Tensor, Any]:
    return torch.get_rng_state(), random.getstate()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def _refuses(what: str, refuses: Callable[[Any], str | None], given: Any) -> bool:
    """Whether a user's code refuses a layer or shape; None or a reason are the only answers."""
    with _attempt(what):
        reason = refuses(given)
    _require(reason is None or (isinstance(reason, str) and reason), f"{what} gives {reason!r}, no reason in words")
    return reason is not None


@contextmanager
def _attempt(what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into an AssertionError that names it."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)
