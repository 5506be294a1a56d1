"""What a call of oneDNN costs beside its arithmetic: why Inductor at batch 1 gains little from int8.

The convolutions of a ResNet-20 alone, as Inductor calls them, in float and in int8: at batch 1, at batch 64, and on an
image of 2 x 2, which has hardly any arithmetic. Interleaved, single-threaded; medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

SHAPES = {"2 x 2": (1, 16, 2), "batch 1": (1, 16, 28), "batch 64": (64, 16, 28), "batch 64, 64 channels": (64, 64, 7)}
_AROUND: tuple[list[int], list[int], list[int], int] = ([1, 1], [1, 1], [1, 1], 1)


def calls(num: int, channels: int, size: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A 3 x 3 convolution with ReLU in float and in int8, with packed weights."""
    shape = [num, channels, size, size]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
    codes = codes.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 127, (channels, channels, 3, 3), dtype=torch.int8, generator=generator)
    scale, zero, bias = torch.full((channels,), 0.01), torch.zeros(channels, dtype=torch.int64), torch.zeros(channels)
    x, dense = codes.float(), weight.float()
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 0.02, 128, *_AROUND, shape)
    # what Inductor calls
    reordered = torch.ops.mkldnn._reorder_convolution_weight(dense, *_AROUND, shape)  # noqa: SLF001

    def in_int8() -> Tensor:
        ends: tuple[Any, ...] = (0.05, 0, torch.uint8, "relu", [], "")
        return torch.ops.onednn.qconv_pointwise(codes, 0.02, 128, packed, scale, zero, bias, *_AROUND, *ends)

    def in_float() -> Tensor:
        # what Inductor calls
        return torch.ops.mkldnn._convolution_pointwise(x, reordered, bias, *_AROUND, "relu", [], "")  # noqa: SLF001

    return in_float, in_int8


def run(repeats: int = 15) -> dict[str, Any]:
    """Headline: microseconds of an int8 call without arithmetic, and the speed-up at batch 1 and 64."""
    torch.set_num_threads(1)
    rows = []
    for name, shape in SHAPES.items():
        pair = calls(*shape)
        taken: tuple[list[float], list[float]] = ([], [])
        with torch.no_grad():
            for call in pair * 20:
                call()
            for _ in range(repeats):
                for times, call in zip(taken, pair, strict=True):
                    begin = time.perf_counter()
                    for _ in range(20):
                        call()
                    times.append((time.perf_counter() - begin) / 20 * 1e6)
        in_float, in_int8 = map(median, taken)
        rows.append({"input": name, "float us": in_float, "int8 us": in_int8, "speed-up": in_float / in_int8})
    by_name = {row["input"]: row for row in rows}
    headline = {"empty_us": by_name["2 x 2"]["int8 us"]}
    headline |= {key: by_name[name]["speed-up"] for key, name in (("batch1", "batch 1"), ("batch64", "batch 64"))}
    return {"headline": headline, "rows": rows}
