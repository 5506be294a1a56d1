"""Selection of scores that several processes hold together is that of one process, bit for bit."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from math import nan
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_compress.pruning.sharding import processes_of
from lightning_compress.pruning.threshold import CHUNK, Processes, keep_highest

from .helpers import noise

SPARSITIES = [0.0, 0.001, 0.3, 0.8, 0.999, 1.0]
SPLITS = [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0], [0.9, 0.1]]


def tensors(digits: int) -> list[Tensor]:
    """Few values make many ties, of which some are dropped."""
    shapes = [(40, 7), (1, 3), (5,), (0, 4), (9, 3, 3)]
    return [(noise(*shape, seed=i) * (1 + i)).round(decimals=digits) for i, shape in enumerate(shapes)]


def shard(scores: list[Tensor], shares: list[float], rank: int) -> list[Tensor]:
    """The rank's rows of every tensor."""
    ends = np.cumsum([0.0, *shares])
    return [s[round(ends[rank] * len(s)) : round(ends[rank + 1] * len(s))] for s in scores]


def assert_one(shards: list[list[Tensor]], scores: list[Tensor], sparsity: float) -> None:
    expected = keep_highest(scores, sparsity)
    assert all(
        torch.equal(torch.cat(parts), keep) for parts, keep in zip(zip(*shards, strict=True), expected, strict=True)
    )


def on_threads(shards: list[list[Tensor]], sparsity: float) -> list[Any]:
    """What each rank keeps, or its error; the ranks are threads."""
    barrier, given = Barrier(len(shards)), [None] * len(shards)

    def work(rank: int) -> Any:
        def gather(array: np.ndarray) -> list[np.ndarray]:
            given[rank] = array.copy()
            barrier.wait(20)
            arrays = list(given)
            barrier.wait(20)
            return arrays

        try:
            return keep_highest(shards[rank], sparsity, Processes(rank, gather))
        except ValueError as error:
            return error

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(work, range(len(shards))))


@pytest.mark.parametrize("shares", [*SPLITS, [1.0], [0.2, 0.0, 0.5, 0.3], [0.0, 0.0, 1.0]], ids=str)
def test_any_split_keeps_what_one_process_keeps(shares: list[float]) -> None:
    for scores in (tensors(digits) for digits in (0, 1, 6)):
        for sparsity in SPARSITIES:
            found = on_threads([shard(scores, shares, rank) for rank in range(len(shares))], sparsity)
            assert_one(found, scores, sparsity)


def test_shards_of_different_scales_and_more_than_a_chunk() -> None:
    scores = [noise(CHUNK + 77).abs(), noise(CHUNK // 2, seed=1).abs() * 1e-3, torch.zeros(1000)]
    for sparsity in (0.2, 0.8):
        shards = [shard(scores, [0.7, 0.3], rank) for rank in range(2)]
        assert_one(on_threads(shards, sparsity), scores, sparsity)


def test_a_nan_of_one_rank_is_an_error_of_all() -> None:
    for position in range(4):
        scores = tensors(6)
        scores[0][position * 10, 3] = nan
        errors = on_threads([shard(scores, [0.5, 0.5], rank) for rank in range(2)], 0.5)
        assert all(isinstance(error, ValueError) and "NaN" in str(error) for error in errors)


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for i, shares in enumerate(SPLITS):
        for digits in (0, 6):
            for sparsity in SPARSITIES:
                kept = keep_highest(shard(tensors(digits), shares, rank), sparsity, processes_of())
                found[i, digits, sparsity] = [keep.numpy() for keep in kept]
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def test_two_processes_keep_what_one_keeps(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    both = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)]
    assert len(both[0]) == len(SPLITS) * 2 * len(SPARSITIES)
    for case in both[0]:
        shards = [[torch.from_numpy(keep) for keep in found[case]] for found in both]
        assert_one(shards, tensors(case[1]), case[2])
