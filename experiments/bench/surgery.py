"""What removing channels inside training buys: time of a step, equality with the masked dense model, a whole run.

ResNet-50, MobileNetV2, a ViT and a BERT of about their usual width lose 30, 50 and 70 % of their channels (all groups
ranked together, by magnitude), the ResNet also 4, 8 and 12 of its blocks. Dense and small steps (forward, backward,
Adam) run interleaved in this process, medians of CPU time, single-threaded. The loss is compared over 20 steps in
float64 with a dense model whose channels are masked after every step and whose norms see only the kept ones, batch
norms learning. The peer is torch-pruning's own step.
The whole runs are Lightning's: dense against ChannelPruning(0.5) early on and fine-tuning, of equally many steps.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.bench.step_overhead import resnet50
from experiments.nets import Bert, FusedAttention, SplitAttention, ViT, mobilenet
from lightning_compress.callbacks import ChannelPruning
from lightning_compress.phase import Phase
from lightning_compress.structure.blocks import choose_blocks, find_blocks, record_blocks, score_block
from lightning_compress.structure.choose import Drops, Limits, num_channels
from lightning_compress.structure.groups import couple
from lightning_compress.structure.proof import choose_channels, prove_groups
from lightning_compress.structure.record import Record, apply_record, tensors_by_name

RATIOS = (0.3, 0.5, 0.7)
NUM_BLOCKS = (4, 8, 12)
MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet50": (resnet50, lambda: torch.randn(8, 3, 64, 64)),
    "mobilenetv2": (lambda: mobilenet(MOBILENET, 32), lambda: torch.randn(8, 3, 64, 64)),
    "vit": (lambda: ViT(384, 6, 6, 64, 8), lambda: torch.randn(4, 3, 64, 64)),
    "bert": (lambda: Bert(512, 8, 4, 5000), lambda: torch.randint(5000, (4, 64))),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--repeats and --steps."""
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of the whole runs")


def shrink(model: nn.Module, x: Tensor, ratio: float) -> tuple[Record, float]:
    """The record that removes a share of the channels, and the milliseconds of planning it with all its proofs."""

    def forward(m: nn.Module) -> Any:
        return m(x)

    begin = time.process_time()
    scores = {n: p.detach().abs() for n, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}
    coupling = prove_groups(model, forward, couple(copy.deepcopy(model), forward), Limits())
    total = sum(int(group.sizes.sum()) for group in coupling.groups)

    def reached(drops: Drops, record: Callable[[], Record]) -> bool:
        return num_channels(coupling.groups, drops) <= (1 - ratio) * total

    record, _, enough = choose_channels(model, forward, coupling, scores, Limits(), reached)
    assert enough, coupling.skipped
    return record, (time.process_time() - begin) * 1e3


def without_blocks(model: nn.Module, x: Tensor, num: int) -> nn.Module:
    """A copy that lost the blocks whose weights are the smallest."""

    def forward(m: nn.Module) -> Any:
        return m(x)

    names, _ = find_blocks(model, forward)
    magnitudes = {n: p.detach().abs() for n, p in model.named_parameters() if p.dim() > 1}
    scores = {name: score_block(model, name, magnitudes) for name in names}
    smaller = copy.deepcopy(model)
    apply_record(smaller, record_blocks(choose_blocks(model, forward, names, scores, num)))
    return smaller


def step_of(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """One training step."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    y = torch.arange(len(x))

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def interleaved(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median milliseconds of CPU time."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if i:  # the first warms up
                taken[name].append((time.process_time() - begin) * 1e3)
    return {name: median(times) for name, times in taken.items()}


def loss_difference(model: nn.Module, x: Tensor, record: Record, num_steps: int = 20) -> float:
    """Largest difference of the loss between the small and the masked dense model while both train."""
    dense, small = copy.deepcopy(model).double().train(), copy.deepcopy(model).double().train()
    x = x.double() if x.is_floating_point() else x
    masks = masked(dense, record)
    optimizers = {id(m): torch.optim.Adam(m.parameters(), 1e-4) for m in (dense, small)}
    apply_record(small, record, [optimizers[id(small)]])
    largest = 0.0
    for _ in range(num_steps):
        losses = []
        for m in (dense, small):
            optimizers[id(m)].zero_grad()
            loss = F.cross_entropy(m(x), torch.arange(len(x)))
            loss.backward()
            optimizers[id(m)].step()
            losses.append(float(loss))
        for tensor, mask in masks:
            tensor.data.mul_(mask)
        largest = max(largest, abs(losses[0] - losses[1]))
    return largest


def masked(model: nn.Module, record: Record) -> list[tuple[Tensor, Tensor]]:
    """Zero what a record removes, let layer norms see only what it keeps; gives the tensors with their masks."""
    masks, modules = [], dict(model.named_modules())
    for name, axes in record.kept.items():
        tensor = tensors_by_name(model)[name]
        mask = torch.ones_like(tensor.data)
        for axis, keep in axes.items():
            gone = torch.ones(mask.shape[axis], dtype=torch.bool).index_fill_(0, keep, False)
            mask.index_fill_(axis, gone.nonzero().flatten(), 0.0)
        tensor.data.mul_(mask)
        masks.append((tensor, mask))
        owner: Any = modules[name.rpartition(".")[0]]
        if isinstance(owner, nn.LayerNorm):
            owner.__dict__["forward"] = _norm_of(owner, axes[0])
    return masks


def _norm_of(norm: nn.LayerNorm, keep: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = F.layer_norm(x[..., keep], (len(keep),), norm.weight[keep], norm.bias[keep], norm.eps)
        return torch.zeros_like(x).index_copy(-1, keep, y)

    return forward


def peer_ms(model: nn.Module, x: Tensor, ratio: float) -> float:
    """Milliseconds of torch-pruning's own pruner; NaN where it fails or its model does not run."""
    model = copy.deepcopy(model)
    attentions = [m for m in model.modules() if isinstance(m, FusedAttention | SplitAttention)]
    heads = {m.qkv: m.num_heads for m in attentions if isinstance(m, FusedAttention)}
    for m in attentions:
        if isinstance(m, SplitAttention):
            heads |= dict.fromkeys((m.query, m.key, m.value), m.num_attention_heads)
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in (10, 1000)]
    begin = time.process_time()
    try:
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        pruner = tp.pruner.BasePruner(
            model, x, importance, pruning_ratio=ratio, ignored_layers=ignored, num_heads=heads, global_pruning=True
        )
        pruner.step()
        taken = (time.process_time() - begin) * 1e3
        model(x)
    except Exception:
        return float("nan")
    return taken


class Module(pl.LightningModule):
    """ResNet-50 with Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet50()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The same."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 1e-4)


def run_seconds(callbacks: list[pl.Callback], num_steps: int) -> float:
    """Wall time of one Lightning run with its planning."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8 * num_steps, 3, 64, 64), torch.arange(8 * num_steps) % 10)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        callbacks=callbacks,
    )
    begin = time.perf_counter()
    trainer.fit(Module(), DataLoader(data, 8), DataLoader(data, 8))
    return time.perf_counter() - begin


def run(repeats: int = 5, steps: int = 40) -> dict[str, Any]:
    """Headline: a ResNet-50 step at half the channels, the largest loss difference, a whole run against the dense."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows: list[dict[str, Any]] = []
    for name, (make, inputs) in NETS.items():
        torch.manual_seed(0)
        dense, x = make(), inputs()
        num = sum(p.numel() for p in dense.parameters())
        records = {ratio: shrink(dense, x[:2], ratio) for ratio in RATIOS}
        small = {ratio: copy.deepcopy(dense) for ratio in RATIOS}
        applied = {}
        for ratio, (record, _) in records.items():
            optimizer = torch.optim.Adam(small[ratio].parameters())
            begin = time.process_time()
            apply_record(small[ratio], record, [optimizer])
            applied[ratio] = (time.process_time() - begin) * 1e3
        models = {"dense": dense, **{str(ratio): model for ratio, model in small.items()}}
        ms = interleaved({key: step_of(copy.deepcopy(m).train(), x) for key, m in models.items()}, repeats)
        for ratio, (record, plan_ms) in records.items():
            rows.append(
                {
                    "model": name,
                    "removed": f"{ratio:.0%} of channels",
                    "parameters_left": sum(p.numel() for p in small[ratio].parameters()) / num,
                    "speedup": ms["dense"] / ms[str(ratio)],
                    "step_ms": ms[str(ratio)],
                    "loss_diff": loss_difference(dense, x, record),
                    "plan_ms": plan_ms,
                    "apply_ms": applied[ratio],
                    "peer_ms": peer_ms(dense, x[:2], ratio),
                }
            )
    torch.manual_seed(0)
    dense, x = resnet50(), torch.randn(8, 3, 64, 64)
    models = {"dense": dense, **{f"{num} blocks": without_blocks(dense, x[:2], num) for num in NUM_BLOCKS}}
    ms = interleaved({key: step_of(copy.deepcopy(m).train(), x) for key, m in models.items()}, repeats)
    for key, model in list(models.items())[1:]:
        left = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
        found = {"parameters_left": left, "speedup": ms["dense"] / ms[key], "step_ms": ms[key]}
        rows.append(dict.fromkeys(rows[0], "-") | {"model": "resnet50", "removed": key} | found)
    seconds = run_seconds([ChannelPruning(0.5, phase=Phase(0.0, 0.1))], steps), run_seconds([], steps)
    speedup = next(row["speedup"] for row in rows if row["model"] == "resnet50" and row["removed"] == "50% of channels")
    headline = {
        "resnet50_speedup": speedup,
        "max_loss_diff": max(row["loss_diff"] for row in rows if row["loss_diff"] != "-"),
        "run_time_ratio": seconds[0] / seconds[1],
    }
    return {"headline": headline, "rows": rows}
