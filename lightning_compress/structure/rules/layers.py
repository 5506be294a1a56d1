"""Operations that multiply by weights or by each other, norms, attention, and what moves along images and sequences."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_compress.structure.axes import Axis, in_steps, pin, product_of, split_in_two, unite
from lightning_compress.structure.rules.call import Axes, Call, Rule, joined

__all__ = ["BATCH_NORMS", "RULES"]


def _product(call: Call) -> Sequence[Axes]:
    """(..., m, k) times (..., k, n), to which something may be added."""
    first = call.axes(_FIRST.get(call.name, "self"))
    second = call.axes(_SECOND[call.name])
    unite(first[-1], second[-2] if len(second) > 1 else second[-1])
    batch = joined([first[:-2], second[:-2]])
    result = (*batch, *first[-2:-1], *second[-1:]) if len(second) > 1 else first[:-1]
    if call.name in _FIRST:
        result = joined([result, call.axes("self")])
    return [result, *(call.new(i) for i in range(1, len(call.outputs)))]


_FIRST = {"addmm": "mat1", "baddbmm": "batch1", "addmv": "mat", "_addmm_activation": "mat1"}
_FIRST |= {"_sparse_addmm": "mat1"}
_SECOND = {"mm": "mat2", "bmm": "mat2", "mv": "vec", "addmm": "mat2", "baddbmm": "batch2", "addmv": "vec"}
_SECOND |= {"_addmm_activation": "mat2", "_sparse_addmm": "mat2", "_sparse_mm_reduce_impl": "other"}


def _product_of_experts(call: Call) -> Sequence[Axes] | None:
    """(rows, k) times (experts, k, n), of which each expert takes some of the rows."""
    first, second = call.axes("self"), call.axes("mat2")
    if (len(first), len(second)) != (2, 3):
        return None
    unite(first[1], second[1])
    for axis in second[1:]:  # the kernel wants rows of whole 16 bytes
        in_steps(axis, 16 // call.outputs[0].element_size())
    return [(first[0], second[2])]


def _dot(call: Call) -> Sequence[Axes]:
    unite(call.axes()[0], call.axes("tensor")[0])
    return [()]


def _linear(call: Call) -> Sequence[Axes]:
    x, weight = call.axes("input"), call.axes("weight")
    unite(x[-1], weight[-1])
    for bias in call.optional("bias"):
        unite(bias[0], weight[0])
    return [(*x[:-1], *weight[:-1])]


def _distance(call: Call) -> Sequence[Axes]:
    first, second = call.axes("x1"), call.axes("x2")
    unite(first[-1], second[-1])
    return [(*joined([first[:-2], second[:-2]]), first[-2], second[-2])]


def _convolution(call: Call) -> Sequence[Axes] | None:
    x, weight = call.axes("input"), call.axes("weight")
    groups = call["groups"] or 1
    new = call.new()
    num_in, num_out = x[1].size, new[1].size
    if groups == 1:
        ins, outs = (weight[0], weight[1]) if call["transposed"] else (weight[1], weight[0])
        unite(x[1], ins)
    elif groups == num_in and weight[1].size == 1 and not call["transposed"]:
        outs = weight[0]
        halves = split_in_two(outs, groups)  # each channel gives as many
        if halves is None:
            return None
        unite(x[1], halves[0])
    else:
        outs = _grouped(call, x[1], weight, groups, num_out)
    for bias in call.optional("bias"):
        unite(bias[0], outs)
    for kernel in weight[2:]:
        pin(kernel, "a kernel")
    return [(x[0], outs, *new[2:])]


def _grouped(call: Call, x: Axis, weight: Axes, groups: int, num_out: int) -> Axis:
    """The output channels of a convolution in groups, each of which loses the same channels."""
    ins = split_in_two(x, groups)
    first = split_in_two(weight[0], groups)
    assert ins is not None  # torch has refused others
    assert first is not None
    unite(ins[0], first[0])
    call.keep(first[0], "it computes in groups of channels")
    own = (first[1], weight[1]) if call["transposed"] else (weight[1], first[1])
    unite(ins[1], own[0])
    return product_of([first[0], own[1]])


def _layer_norm(call: Call) -> Sequence[Axes]:
    x = call.axes("input")
    own = x[len(x) - len(call["normalized_shape"]) :]
    for other in call.optional("weight", "bias"):
        joined([own, other])
    return [x, *(call.new(i) for i in range(1, len(call.outputs)))]


def _group_norm(call: Call) -> Sequence[Axes]:
    x = call.axes("input")
    for other in call.optional("weight", "bias"):
        unite(x[1], other[0])
    halves = split_in_two(x[1], call["group"])
    if halves is not None and halves[1].size > 1 < halves[0].size:
        call.keep(halves[0], "a norm takes its channels in groups")
    return [x, *(call.new(i) for i in range(1, len(call.outputs)))]


def _batch_norm(call: Call) -> Sequence[Axes]:
    x = call.axes("input")
    for other in call.optional("weight", "bias", "running_mean", "running_var"):
        unite(x[1], other[0])
    return [x, *(call.new(i) for i in range(1, len(call.outputs)))]


def _attention(call: Call) -> Sequence[Axes]:
    """(..., heads, length, channels): queries and keys of the same channels, keys and values of the same places."""
    query, key, value = (call.axes(name) for name in ("query", "key", "value"))
    unite(query[-1], key[-1])
    unite(key[-2], value[-2])
    joined([key[:-2], value[:-2]])
    batch = query[:-2]
    for ours, theirs in zip(batch, key[:-2], strict=True):
        grouped = split_in_two(ours, theirs.size)  # several heads of queries may share one of keys and values
        if grouped is not None:
            unite(grouped[0], theirs)
    for mask in call.optional("attn_mask", "attn_bias"):
        joined([(*batch, query[-2], key[-2]), mask])
    found: list[Axes] = [(*batch, query[-2], value[-1])]
    return [*found, *(call.new(i) for i in range(1, len(call.outputs)))]


def _weight_norm(call: Call) -> Sequence[Axes]:
    v, g = call.axes("v"), call.axes("g")
    dim = call["dim"] or 0
    joined([v, g])
    return [v, (v[dim],)] if len(call.outputs) > 1 and call.outputs[1].dim() == 1 else [v, g][: len(call.outputs)]


def _moving(call: Call) -> Sequence[Axes]:
    """Channels stay, and the axes of images and sequences become others."""
    x = next(axes for axes in call.optional("self", "input"))
    digit = re.search(r"([123])d", call.name)
    num = int(digit.group(1)) if digit else len(x) - 2
    for axis in x[len(x) - num :]:
        call.keep(axis, f"{call.name.strip('_')} moves along its channels")
    kept = x[: len(x) - num]
    return [(*kept, *call.new(i)[len(kept) :]) for i in range(len(call.outputs))]


def _packed(call: Call) -> Sequence[Axes]:
    """Sequences of different lengths, one behind the other: the channels stay."""
    x = next(axes for axes in call.optional("input", "data"))
    return [(*call.new()[:-1], x[-1]), *(call.new(i) for i in range(1, len(call.outputs)))]


def _transform(call: Call) -> Sequence[Axes]:
    """A Fourier transform: along some axes all depends on all."""
    axes = call.axes()
    dims = {dim % len(axes) for dim in call["dim"]}
    for dim in dims:
        call.keep(axes[dim], "a Fourier transform is taken over its channels")
    return [tuple(new if dim in dims else axes[dim] for dim, new in enumerate(call.new()))]


BATCH_NORMS: tuple[str, ...] = ("native_batch_norm", "_native_batch_norm_legit", "batch_norm")
BATCH_NORMS += ("_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_no_update")

_MOVING: tuple[str, ...] = (
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool1d",
)
_MOVING += ("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d")
_MOVING += ("adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max_unpool2d")
_MOVING += ("fractional_max_pool2d", "fractional_max_pool3d", "max_unpool3d", "grid_sampler_2d", "grid_sampler_3d")
_MOVING += tuple(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3))
_MOVING += (
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
)
_MOVING += ("upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
_MOVING += ("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SECOND, _product),
    "dot": _dot,
    "_grouped_mm": _product_of_experts,
    "linear": _linear,
    "_cdist_forward": _distance,
    "_euclidean_dist": _distance,
    "convolution": _convolution,
    "_convolution": _convolution,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "scaled_dot_product_attention": _attention,
    "_weight_norm_interface": _weight_norm,
    "_pack_padded_sequence": _packed,
    "_pad_packed_sequence": _packed,
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), _transform),
    **dict.fromkeys(_MOVING, _moving),
}
