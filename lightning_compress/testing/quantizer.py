"""Whether a quantizer keeps its contract."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.quantizer import QParams, Quantizer
from lightning_compress.testing.attempt import attempt, noise, require, same

__all__ = ["check_quantizer"]

# with 0 inside, at an end, outside; narrow, wide, empty
_RANGES = (
    *((-1.0, 1.0), (-0.3, 2.7), (-127.0, 128.0), (-2e-3, 1e-3), (-1e4, 3e4)),
    *((0.0, 6.0), (-3.0, 0.0), (1.0, 3.0), (-5.0, -2.0), (0.0, 1e-6), (0.0, 0.0), (0.7, 0.7), (-0.7, -0.7)),
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
    require(isinstance(quantizer, Quantizer), f"{name} is no subclass of lightning_compress.quantization.Quantizer")
    bits = getattr(quantizer, "bits", None)
    require(isinstance(bits, int) and bits > 0, f"{name}.bits is {bits!r}, not a whole number above 0")
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
        require(
            _close(together, torch.cat(alone), rows),
            f"{name} gives a channel other values than the same range for a tensor {where}",
        )
    _check_fit(quantizer)


def _check_fit(quantizer: Quantizer) -> None:
    name = type(quantizer).__name__
    normal = noise((24, 32), seed=5)
    samples = {
        "normal values": normal,
        "heavy-tailed values": normal**5,
        "values that are mostly zero": normal * (noise(normal.shape, seed=6, uniform=True) > 0.9),
        "one value": torch.full_like(normal, 0.7),
        "one negative value": torch.full_like(normal, -0.7),
        "zeros": torch.zeros_like(normal),
    }
    for (kind, x), axis in itertools.product(samples.items(), (None, 0, 1)):
        where = f"for {kind} with {'one scale' if axis is None else f'one scale a channel of axis {axis}'}"
        before = x.clone()
        with attempt(f"{name}.fit {where}"):
            qparams = quantizer.fit(x, axis)
            again = quantizer.fit(x, axis)
        require(torch.equal(x, before), f"{name}.fit changed its input {where}")
        require(isinstance(qparams, QParams), f"{name}.fit gives a {type(qparams).__name__}, not QParams, {where}")
        require(same(tuple(qparams), tuple(again)), f"{name}.fit is not the same when asked twice {where}")
        for field in quantizer.learned:
            value = getattr(qparams, field)
            require(isinstance(value, Tensor), f"{name}.fit gives no {field}, which is learned, {where}")
            valid = bool((torch.isfinite(value) & (value > 0)).all())
            require(valid, f"{name}.fit gives a {field}, which is learned, that is not positive and finite {where}")
        with attempt(f"{name}.dequantize(quantize(x)) {where}"):
            values = quantizer.dequantize(quantizer.quantize(x, qparams), qparams)
        error = (values - x).square().sum()
        most = x.square().sum()
        require(bool(error <= most), f"{name}.fit makes of the values something farther from them than 0 {where}")
        if kind == "normal values" and quantizer.learned:
            leaves = [getattr(qparams, field).clone().requires_grad_() for field in quantizer.learned]
            with torch.enable_grad(), attempt(f"{name}.fake_quantize {where}"):
                learned = dict(zip(quantizer.learned, leaves, strict=True))
                faked = quantizer.fake_quantize(2 * x, qparams._replace(**learned))
                gradients = torch.autograd.grad(faked, leaves, noise(x.shape, seed=7))
            for field, gradient in zip(quantizer.learned, gradients, strict=True):
                moved = bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())
                require(moved, f"{name}.fake_quantize gives {field} a gradient that is 0 or not finite {where}")


def _check_values(
    quantizer: Quantizer, rows: Tensor, low: Tensor, high: Tensor, axis: int | None, where: str
) -> Tensor:
    """Check ascending rows of values, each with its own range; gives what the values became, row by row."""
    name = type(quantizer).__name__
    turn = _turn(axis)
    x = turn(rows)
    qparams = _qparams(quantizer, *((low, high) if axis is not None else (low[0], high[0])), axis, where)

    def round_trip(x: Tensor) -> tuple[Tensor, Tensor]:
        before = x.clone()
        with attempt(f"{name}.quantize {where}"):
            codes = quantizer.quantize(x, qparams)
        require(codes.shape == x.shape, f"{name}.quantize gives the shape {tuple(codes.shape)}, not x's, {where}")
        with attempt(f"{name}.dequantize {where}"):
            values = quantizer.dequantize(codes, qparams)
        require(values.shape == x.shape, f"{name}.dequantize gives the shape {tuple(values.shape)}, not x's, {where}")
        require(torch.equal(x, before), f"{name}.quantize changed its input {where}")
        return codes, values

    zeros = torch.zeros_like(x)
    worst = round_trip(zeros)[1].abs().max()
    require(bool(worst == 0), f"{name}: dequantize(quantize(0)) is {worst:g} and not 0 {where}")
    with attempt(f"{name}.fake_quantize {where}"):
        worst = quantizer.fake_quantize(zeros, qparams).abs().max()
    require(bool(worst == 0), f"{name}: fake_quantize(0) is {worst:g} and not 0 {where}")

    codes, values = (turn(t) for t in round_trip(x))
    require(bool((codes == codes.round()).all()), f"{name}.quantize gives codes that are no whole numbers {where}")
    most = max(len(row.unique()) for row in codes)
    require(
        most <= quantizer.num_codes,
        f"{name}.quantize gives {most} different codes {where}; {quantizer.bits} bits hold {quantizer.num_codes}",
    )
    alike = [len(row.unique()) == 1 for row in codes[low < high]]
    require(not any(alike), f"{name}.quantize gives one and the same code for all values {where}")
    require(bool(torch.isfinite(values).all()), f"{name}: dequantize(quantize(x)) is not finite {where}")
    falls = values.diff(dim=1) < -_tolerance(rows)
    require(not falls.any(), f"{name}: dequantize(quantize(x)) falls where x rises {where}")
    again = turn(round_trip(turn(values))[1])
    require(_close(again, values, rows), f"{name}: quantizing a quantized value again changes it {where}")
    if isinstance(quantizer, Affine):
        inside = (rows >= low.clamp(max=0)[:, None]) & (rows <= high.clamp(min=0)[:, None])
        error = ((values - rows).abs() - qparams.scale.reshape(-1, 1) - _tolerance(rows))[inside]
        require(not (error > 0).any(), f"{name}: dequantize(quantize(x)) is more than one step from x {where}")

    _check_fake_quantized(quantizer, rows, values, qparams, axis, where)
    return values


def _check_fake_quantized(
    quantizer: Quantizer, rows: Tensor, values: Tensor, qparams: QParams, axis: int | None, where: str
) -> None:
    """Check that training sees the quantized values, and gradients as if there were none."""
    name = type(quantizer).__name__
    turn = _turn(axis)
    x = turn(rows)
    with torch.enable_grad(), attempt(f"{name}.fake_quantize {where}"):
        leaf = x.clone().requires_grad_()
        faked = quantizer.fake_quantize(leaf, qparams)
        upstream = noise(x.shape, seed=4, uniform=True) + 0.5
        (gradient,) = torch.autograd.grad(faked, leaf, upstream)
    faked = turn(faked.detach())
    gradient = turn(gradient / upstream)
    if not _close(faked, values, rows):
        index = int((faked - values).abs().argmax())
        at, got, expected = (f"{float(t.flatten()[index]):g}" for t in (rows, faked, values))
        what = f"fake_quantize({at}) is {got}, but dequantize(quantize({at})) is {expected}"
        raise AssertionError(f"{name}: {what} {where}")
    require(bool(torch.isfinite(gradient).all()), f"{name}.fake_quantize has a gradient that is not finite {where}")
    inside = (rows >= values.amin(1, keepdim=True)) & (rows <= values.amax(1, keepdim=True))
    straight = bool(((gradient[inside] - 1).abs() < 1e-5).all())
    require(straight, f"{name}.fake_quantize has a gradient that is not straight-through inside the range {where}")


def _probe(quantizer: Quantizer, qparams: QParams, low: float, high: float, where: str) -> Tensor:
    """Values in and around a range, and those half way between two codes, where rounding shows."""
    margin = 0.25 * (high - low) + 0.01 * max(abs(low), abs(high))
    num = min(4 * 2**quantizer.bits, 2048) + 1
    grid = torch.cat([torch.linspace(low - margin, high + margin, num), torch.linspace(low, high, num)])
    with attempt(f"{type(quantizer).__name__}.dequantize(quantize(x)) {where}"):
        levels = quantizer.dequantize(quantizer.quantize(grid.clone(), qparams), qparams).unique()
    levels = levels[levels.isfinite()]
    return torch.cat([grid, (levels[1:] + levels[:-1]) / 2])


def _qparams(quantizer: Quantizer, low: Tensor, high: Tensor, axis: int | None, where: str) -> QParams:
    with attempt(f"{type(quantizer).__name__}.qparams {where}"):
        return quantizer.qparams(low, high, axis)


def _turn(axis: int | None) -> Callable[[Tensor], Tensor]:
    """Rows to a tensor with its channels along an axis, and back."""
    return (lambda t: t.t().contiguous()) if axis == 1 else (lambda t: t)


def _tolerance(rows: Tensor) -> Tensor:
    """What rounding of floats may cost, a row: ``x + (y - x)`` is not y to the last bit."""
    return 1e-6 * rows.abs().amax(1, keepdim=True)


def _close(a: Tensor, b: Tensor, rows: Tensor) -> bool:
    return bool(((a - b).abs() <= _tolerance(rows)).all())
