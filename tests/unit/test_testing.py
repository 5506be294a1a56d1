"""The contract checks: they pass what is right, and name what is broken."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.layers import Layer
from lightning_compress.pruning import Criterion, Element, Magnitude, Pattern, Random
from lightning_compress.quantization import Affine, LearnedStep, MinMax, MovingAverage, Observer, QParams, Quantizer
from lightning_compress.testing import check_criterion, check_observer, check_pattern, check_quantizer

from .test_convert import PowerOfTwo
from .test_patterns import Own
from .test_quantizers import Ternary


class Rows(Pattern):
    """Blocks of 4 rows in one column, of a weight seen as a matrix."""

    def reduce(self, scores: Tensor) -> Tensor:
        matrix = scores.flatten(1)
        return matrix.view(-1, 4, matrix.shape[1]).mean(1)

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        return keep.repeat_interleave(4, 0).view(shape)


class Gradient(Criterion):
    def score(self, layer: Layer) -> Tensor:
        return (layer.weight.detach() * layer.weight.grad).abs()


@pytest.mark.parametrize("criterion", [Magnitude(), Random(1), Gradient()])
def test_a_right_criterion_passes(criterion: Criterion) -> None:
    check_criterion(criterion)


@pytest.mark.parametrize("pattern", [Element(), Own(), Rows()])
def test_a_right_pattern_passes(pattern: Pattern) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize("quantizer", [Affine(8, symmetric=True), Affine(3, symmetric=True), PowerOfTwo(), Ternary()])
def test_a_right_quantizer_passes(quantizer: Quantizer) -> None:
    check_quantizer(quantizer)


def test_the_checks_themselves_leave_the_random_states_alone() -> None:
    before = (torch.get_rng_state(), random.getstate())
    check_criterion(Magnitude())
    check_pattern(Element())
    check_quantizer(Ternary())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def criterion(score: Callable[[Layer], Any]) -> Criterion:
    return type("Broken", (Criterion,), {"score": lambda self, layer: score(layer)})()


def changed(layer: Layer, change: Callable[[Tensor], Any]) -> Tensor:
    with torch.no_grad():
        change(layer.weight)
    return torch.ones_like(layer.weight)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda layer: layer.weight.detach().abs().sum(0), "the shape .* not the weight's, for a Linear"),
        (lambda layer: layer.weight.detach().abs().flatten(), "the shape .* not the weight's"),
        (lambda layer: layer.weight.detach().log(), "is not finite"),
        (lambda layer: layer.weight.detach() / layer.weight.detach().norm(), "not finite .* with all weights zero"),
        (lambda layer: 1 / layer.weight.detach(), "not finite .* with half of the weights zero"),
        (lambda layer: 1.0, "gives a float, not a tensor"),
        (lambda layer: torch.rand_like(layer.weight), "not the same when asked twice"),
        (lambda layer: (torch.rand(1), torch.ones_like(layer.weight))[1], "drew from the global random state"),
        (lambda layer: (random.random(), torch.ones_like(layer.weight))[1], "drew from the global random state"),
        (lambda layer: changed(layer, lambda w: w.abs_()), "changed the weight for a Linear"),
        (lambda layer: changed(layer, lambda w: w.grad.zero_()), "changed the weight's gradient"),
        (lambda layer: changed(layer, lambda w: setattr(w, "grad", None)), "changed the weight's gradient"),
        (lambda layer: layer.weight.detach().abs() @ torch.ones(3), "raised RuntimeError"),
        (lambda layer: layer.weight.detach() * layer.module.out_features, "Conv2d's .*raised AttributeError"),
        (lambda layer: layer.module.weight.detach().abs(), "LSTM's weight_ih_l0 .*raised AttributeError"),
    ],
)
def test_a_broken_criterion_is_named_with_what_is_broken(score: Callable[[Layer], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)Broken\.score.*{message}"):
        check_criterion(criterion(score))


class Seen(Criterion):
    """The mean square of the outputs, one an output channel, without looking at the axis of the channels."""

    def observe(self, layer: Layer, inputs: Tensor, activations: Tensor) -> Tensor:
        return activations.transpose(0, 1 - layer.weight.dim()).flatten(1).square().mean(1)

    def score(self, layer: Layer) -> Tensor:
        shape = [-1 if axis == layer.out_axis else 1 for axis in range(layer.weight.dim())]
        return layer.weight.detach().abs() * layer.seen.view(shape)


class SeenGradient(Criterion):
    def observe_gradient(self, layer: Layer, gradient: Tensor) -> Tensor:
        return gradient.abs()

    def score(self, layer: Layer) -> Tensor:
        return layer.seen


class SeenNorm(Criterion):
    needs_norm = True

    def score(self, layer: Layer) -> Tensor:
        shape = [-1 if axis == layer.out_axis else 1 for axis in range(layer.weight.dim())]
        return layer.norm.weight.detach().abs().view(shape).expand_as(layer.weight)


@pytest.mark.parametrize("criterion", [Seen(), SeenGradient(), SeenNorm()])
def test_a_right_criterion_that_observes_passes(criterion: Criterion) -> None:
    check_criterion(criterion)


def observing(kind: type[Criterion], **members: Any) -> Criterion:
    return type("Broken", (kind,), members)()


def first(change: Callable[..., Any], method: str) -> dict[str, Any]:
    """The right method after something that it must not do."""
    right = getattr(Seen if method == "observe" else SeenGradient, method)
    return {method: lambda self, layer, *values: (change(layer, *values), right(self, layer, *values))[1]}


@pytest.mark.parametrize(
    ("kind", "members", "message"),
    [
        (Seen, {"observe": lambda self, layer, x, y: y}, r"observe .*gives another shape in every batch"),
        (Seen, {"observe": lambda self, layer, x, y: 1.0}, "observe gives a float, not a tensor, for a Linear"),
        (Seen, {"observe": lambda self, layer, x, y: y.mean(0).log()}, "observe is not finite"),
        (Seen, {"observe": lambda self, layer, x, y: y @ x}, "observe .*raised RuntimeError"),
        (Seen, first(lambda layer, x, y: x.zero_(), "observe"), "observe changed the layer's inputs"),
        (Seen, first(lambda layer, x, y: y.zero_(), "observe"), "observe changed the layer's outputs"),
        (
            Seen,
            first(lambda layer, x, y: layer.weight.mul_(2), "observe"),
            "observe changed a weight",
        ),
        (Seen, first(lambda layer, x, y: torch.rand(1), "observe"), "observe drew from the global random state"),
        (Seen, {"score": lambda self, layer: layer.seen}, "score gives the shape .* not the weight's"),
        (Seen, {"score": lambda self, layer: layer.seen.zero_().sum() + layer.weight}, "changed the layer's seen"),
        (Seen, {"refuses": lambda self, layer: False}, "refuses for a Linear.* gives False, no reason in words"),
        (Seen, {"refuses": lambda self, layer: ""}, "refuses .*gives '', no reason in words"),
        (Seen, {"refuses": lambda self, layer: layer.no}, "refuses .*raised AttributeError"),
        (Seen, {"refuses": lambda self, layer: "never"}, "refuses every layer, or sees nothing of any"),
        (Seen, {"observe_gradient": SeenGradient.observe_gradient}, "overrides observe and observe_gradient"),
        (SeenGradient, first(lambda layer, g: g.zero_(), "observe_gradient"), "observe_gradient changed a gradient"),
        (SeenGradient, first(lambda layer, g: layer.weight.data.add_(1), "observe_gradient"), "changed a weight"),
        (SeenGradient, {"observe_gradient": lambda self, layer, g: layer.weight * g}, "holds on to its graph"),
        (SeenNorm, {"score": lambda self, layer: layer.norm.scale}, "score .*raised AttributeError"),
        (SeenNorm, {"needs_norm": False}, "score for a Linear.*raised AttributeError"),
    ],
)
def test_a_broken_observer_is_named_with_what_is_broken(
    kind: type[Criterion], members: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)Broken.*{message}"):
        check_criterion(observing(kind, **members))


def pattern(reduce: Callable[[Tensor], Tensor], expand: Callable[[Tensor, torch.Size], Tensor]) -> Pattern:
    members = {"reduce": lambda self, scores: reduce(scores), "expand": lambda self, keep, shape: expand(keep, shape)}
    return type("Broken", (Pattern,), members)()


def by_row(keep: Tensor, shape: torch.Size) -> Tensor:
    return keep.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def unequal(keep: Tensor, shape: torch.Size) -> Tensor:
    """The first group holds all but the last weights."""
    mask = keep[0].repeat(shape.numel())
    mask[-len(keep) + 1 :] = keep[1:]
    return mask.view(shape)


@pytest.mark.parametrize(
    ("reduce", "expand", "message"),
    [
        (lambda s: s, lambda k, shape: k.float(), r"expand gives torch.float32, not torch.bool"),
        (lambda s: s, lambda k, shape: k.flatten(), r"expand gives the shape .* not the weight's"),
        (lambda s: s, lambda k, shape: ~k, "expand drops weights when all groups are kept"),
        (lambda s: s, lambda k, shape: torch.ones(shape).bool(), "expand keeps weights when all groups are dropped"),
        (lambda s: s.sum(1), by_row, r"expand for a weight of shape \(16, 16, 3, 3\) raised RuntimeError"),
        (lambda s: s.flatten(1).sum(0), by_row, "expand .*raised RuntimeError"),
        (lambda s: s.flatten()[:7], by_row, "7 groups, which cannot be of one size"),
        (lambda s: s.flatten(1).sum(1).flip(0), by_row, "reduce and .*expand disagree"),
        (lambda s: -s, lambda k, shape: k, "reduce and .*expand disagree"),
        (lambda s: s.flatten(1).norm(dim=1), by_row, "does not rank a group of dropped weights"),
        (lambda s: s.sqrt(), lambda k, shape: k, "does not rank a group of dropped weights"),
        (lambda s: s.flatten(1).sum(1).log2() * torch.nan, by_row, "reduce is not finite"),
        (lambda s: s.mul_(2), lambda k, shape: k, "reduce changed the scores"),
        (lambda s: s.flatten(1).sum(1), unequal, "groups are not of one size"),
        (lambda s: s, lambda k, shape: k | k.roll(1, 0), "groups share weights"),
    ],
)
def test_a_broken_pattern_is_named_with_what_is_broken(reduce: Any, expand: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)Broken\..*{message}"):
        check_pattern(pattern(reduce, expand))


class OneOfTwo(Pattern):
    """Keeps the better one of two neighbours."""

    max_sparsity = 0.5

    def reduce(self, scores: Tensor) -> Tensor:
        return scores

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        return keep

    def refuses(self, shape: torch.Size) -> str | None:
        return "an odd number of inputs" if shape[1] % 2 else None

    def protects(self, groups: Tensor) -> Tensor:
        pairs = groups.unflatten(1, (-1, 2))
        first = pairs[:, :, :1] >= pairs[:, :, 1:]
        return torch.cat([first, ~first], 2).flatten(1, 2)


def test_a_right_pattern_that_protects_passes() -> None:
    check_pattern(OneOfTwo())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"refuses": lambda self, shape: "never"}, r"refuses refuses all of the shapes \(16, 32\), "),
        ({"refuses": lambda self, shape: True}, r"refuses for a weight of shape \(16, 32\) gives True, no reason"),
        ({"refuses": lambda self, shape: shape[9]}, "refuses .*raised IndexError"),
        ({"protects": lambda self, groups: None}, "protects no group, though max_sparsity is 0.5 and not 1"),
        ({"protects": lambda self, groups: groups > 2}, "protects no group, though max_sparsity is 0.5 and not 1"),
        ({"protects": lambda self, groups: groups}, "protects gives torch.float32, not torch.bool"),
        ({"protects": lambda self, groups: groups[0] > 0}, "protects gives the shape .* not that of reduce's groups"),
        ({"protects": lambda self, groups: groups > -1}, "leaves a share of 0 to drop, less than max_sparsity=0.5"),
        ({"protects": lambda self, groups: groups.sub_(1) > 0}, "protects changed the scores"),
        ({"protects": lambda self, groups: groups.no}, "protects .*raised AttributeError"),
        ({"max_sparsity": 0.0}, "max_sparsity is 0; accepted is a share above 0"),
        ({"max_sparsity": 50}, "max_sparsity is 50; accepted"),
        ({"max_sparsity": 0.75}, "leaves a share of 0.5 to drop, less than max_sparsity=0.75"),
        ({"max_sparsity": None}, "max_sparsity raised TypeError"),
    ],
)
def test_a_pattern_whose_protection_is_broken_is_named(members: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)Broken\..*{message}"):
        check_pattern(type("Broken", (OneOfTwo,), members)())


class NoZero(Affine):
    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        return QParams(((high - low) / 255).clamp(min=1e-12), low, axis)

    def _at(self, t: Tensor, x: Tensor, p: QParams) -> Tensor:
        return t if p.axis is None else t.view([-1 if d == p.axis else 1 for d in range(x.dim())])

    def quantize(self, x: Tensor, p: QParams) -> Tensor:
        return ((x - self._at(p.zero_point, x, p)) / self._at(p.scale, x, p)).round().clamp(0, 255)

    def dequantize(self, codes: Tensor, p: QParams) -> Tensor:
        return codes * self._at(p.scale, codes, p) + self._at(p.zero_point, codes, p)


class Fractions(Ternary):
    def quantize(self, x: Tensor, p: QParams) -> Tensor:
        return super().quantize(x, p) / 2

    def dequantize(self, codes: Tensor, p: QParams) -> Tensor:
        return super().dequantize(codes * 2, p)


class TooMany(Ternary):
    bits = 1


class NoBits(Ternary):
    bits = None


class Deaf(Ternary):
    def quantize(self, x: Tensor, p: QParams) -> Tensor:
        return torch.zeros_like(x)


class Falling(Ternary):
    def dequantize(self, codes: Tensor, p: QParams) -> Tensor:
        return super().dequantize(-codes, p)


class Restless(Ternary):
    def dequantize(self, codes: Tensor, p: QParams) -> Tensor:
        return super().dequantize(codes, p) * 0.3


class Infinite(Ternary):
    def dequantize(self, codes: Tensor, p: QParams) -> Tensor:
        return torch.where(codes == 0, 0, codes * torch.inf)


class Coarse(Affine):
    """Skips every code but each fourth."""

    def quantize(self, x: Tensor, p: QParams) -> Tensor:
        return (super().quantize(x, p) / 4).round() * 4

    def fake_quantize(self, x: Tensor, p: QParams) -> Tensor:
        return Quantizer.fake_quantize(self, x, p)


class OtherFake(Ternary):
    def fake_quantize(self, x: Tensor, p: QParams) -> Tensor:
        return 0.99 * super().fake_quantize(x, p)


class NoGradient(Ternary):
    def fake_quantize(self, x: Tensor, p: QParams) -> Tensor:
        return self.dequantize(self.quantize(x, p), p) + 0 * x


class HalfGradient(Ternary):
    def fake_quantize(self, x: Tensor, p: QParams) -> Tensor:
        return x / 2 + (self.dequantize(self.quantize(x, p), p) - x / 2).detach()


class NanGradient(Ternary):
    def fake_quantize(self, x: Tensor, p: QParams) -> Tensor:
        return super().fake_quantize(x, p) + 0 * x.abs().sqrt()


class Detached(Ternary):
    def fake_quantize(self, x: Tensor, p: QParams) -> Tensor:
        return super().fake_quantize(x, p).detach()


class InPlace(Ternary):
    def quantize(self, x: Tensor, p: QParams) -> Tensor:
        return super().quantize(x.clamp_(-1, 1), p)


class OneAxis(Ternary):
    def _scale(self, x: Tensor, p: QParams) -> Tensor:
        return p.scale if p.axis is None else p.scale.view(-1, 1)


class OneRange(Ternary):
    """Takes the widest range for every channel."""

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        p = super().qparams(low, high, axis)
        return p._replace(scale=torch.full_like(p.scale, float(p.scale.max())))


class Learned(Ternary):
    """Learns its scale by the inherited gradient."""

    learned = ("scale",)


class FitsFar(Ternary):
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        qparams = super().fit(x, axis)
        return qparams._replace(scale=3 * qparams.scale.clamp(max=1.0) if axis is None else qparams.scale)

    def quantize(self, x: Tensor, p: QParams) -> Tensor:
        return x.sign()


class FitsInPlace(Ternary):
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        return super().fit(x.clamp_(-1, 1), axis)


class FitsByChance(Ternary):
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        self.num = getattr(self, "num", 0) + 1
        return super().fit(x * (1 + 0.1 * self.num), axis)


class FitsScales(Ternary):
    def fit(self, x: Tensor, axis: int | None = None) -> Tensor:
        return super().fit(x, axis).scale


class LearnsNothing(Ternary):
    learned = ("base",)


class LearnsZero(Learned):
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        qparams = super().fit(x, axis)
        return qparams._replace(scale=torch.where(qparams.scale < 1e-9, 0.0, qparams.scale))


class Unlearned(Learned):
    def fake_quantize(self, x: Tensor, p: QParams) -> Tensor:
        return super().fake_quantize(x, p._replace(scale=p.scale.detach())) + 0 * p.scale.sum()


@pytest.mark.parametrize("quantizer", [Learned(), LearnedStep(3, symmetric=True)])
def test_a_learned_scale_of_ones_own_passes(quantizer: Quantizer) -> None:
    check_quantizer(quantizer)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (FitsFar(), "fit makes of the values something farther from them than 0"),
        (FitsInPlace(), "fit changed its input for normal values"),
        (FitsByChance(), "fit is not the same when asked twice"),
        (FitsScales(), "fit gives a Tensor, not QParams"),
        (LearnsNothing(), "fit gives no base, which is learned"),
        (LearnsZero(), "a scale, which is learned, that is not positive and finite for values that are mostly"),
        (Unlearned(), "gives scale a gradient that is 0"),
        (NoZero(), r"dequantize\(quantize\(0\)\) is .* and not 0 for the range"),
        (Fractions(), "codes that are no whole numbers"),
        (TooMany(), "3 different codes .*; 1 bits hold 2"),
        (NoBits(), "bits is None"),
        (Deaf(), "one and the same code"),
        (Falling(), "falls where x rises"),
        (Restless(), "quantizing a quantized value again changes it"),
        (Infinite(), "is not finite"),
        (Coarse(4, symmetric=True), "more than one step from x"),
        (OtherFake(), r"fake_quantize\(.*\) is .*, but dequantize\(quantize\(.*\)\) is"),
        (NoGradient(), "not straight-through inside the range"),
        (HalfGradient(), "not straight-through inside the range"),
        (NanGradient(), "gradient that is not finite"),
        (Detached(), "fake_quantize .*raised RuntimeError"),
        (InPlace(), "quantize changed its input"),
        (OneAxis(), "a channel of axis 1"),
        (OneRange(), "a channel of axis 0"),
    ],
)
def test_a_broken_quantizer_is_named_with_what_is_broken(broken: Quantizer, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s){type(broken).__name__}.*{message}"):
        check_quantizer(broken)


class Short(MinMax):
    def start(self) -> Tensor:
        return torch.zeros(2, 2)


class Eager(MinMax):
    def start(self) -> Tensor:
        return torch.tensor([-1.0, 1.0])


class Growing(MinMax):
    def update(self, state: Tensor, values: Tensor) -> Tensor:
        return torch.cat([super().update(state[:2], values), state[2:], state[:1]]) if values.numel() else state


class Overwriting(MinMax):
    def update(self, state: Tensor, values: Tensor) -> Tensor:
        return state.copy_(super().update(state, values))


class Wide(MinMax):
    def range(self, state: Tensor, quantizer: Quantizer) -> Tensor:
        return state * 2


class Single(MinMax):
    def range(self, state: Tensor, quantizer: Quantizer) -> Tensor:
        return state[:1]


class Empty(MinMax):
    def update(self, state: Tensor, values: Tensor) -> Tensor:
        return super().update(state, values) if values.numel() else state / 2


class First(MinMax):
    def merge(self, states: Tensor) -> Tensor:
        return states[-1]


class Clipping(MinMax):
    def update(self, state: Tensor, values: Tensor) -> Tensor:
        return super().update(state, values.clamp_(-1, 1))


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(0.5)])
def test_a_right_observer_passes(observer: Observer) -> None:
    check_observer(observer)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Short(), "start gives no tensor of one axis"),
        (Eager(), "gives a range though nothing was seen"),
        (Growing(), "a state of another shape or type"),
        (Overwriting(), "changed the state before"),
        (Wide(), r"range is .*, seen was"),
        (Single(), r"the shape \(1,\), not \(2,\)"),
        (Empty(), "changed the state for no values"),
        (First(), "depends on the order of the ranks"),
        (Clipping(), "changed the values"),
    ],
)
def test_a_broken_range_observer_is_named_with_what_is_broken(broken: Observer, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s){type(broken).__name__}.*{message}"):
        check_observer(broken)


@pytest.mark.parametrize("check", [check_criterion, check_pattern, check_quantizer, check_observer])
def test_a_class_of_another_kind_is_refused(check: Callable[[Any], None]) -> None:
    with pytest.raises(AssertionError, match="list is no subclass of lightning_compress"):
        check([])
