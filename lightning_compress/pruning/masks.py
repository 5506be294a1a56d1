"""Scores to masks, and masks enforced on the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.layers import Layer
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.observation import Observation
from lightning_compress.pruning.patterns import Element, Pattern, WholeLayer
from lightning_compress.pruning.scopes import Scope, keep_groups, num_needed, split_by_scope
from lightning_compress.pruning.sharding import is_sharded, ranks_for, sharded_as, whole
from lightning_compress.pruning.threshold import CHUNK, Cut, find_cut, num_dropped, spread_sample
from lightning_compress.structure.record import Record, kept_by_id

__all__ = ["Masks"]


class Masks:
    """One mask a layer, int8 with 1 = kept: the cheapest kind to multiply into a weight in place.

    The mask of a sharded weight is sharded like it: then all processes call ``sparsity``, ``update``, ``exchange`` and
    ``state_dict`` together, and the state is the same on all of them.

    Args:
        layers: The layers that are pruned.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self._masks = {layer.name: torch.ones_like(layer.weight, dtype=torch.int8) for layer in layers}

    def are_of(self, layers: Sequence[Layer]) -> bool:
        """Whether these are the masks of exactly these weights."""
        return [id(layer.weight) for layer in layers] == [id(layer.weight) for layer in self.layers]

    @property
    def sparsity(self) -> float:
        """Share of the weights that is dropped."""
        return 1 - self._num_kept(self.layers) / max(1, sum(mask.numel() for mask in self._masks.values()))

    def _num_kept(self, layers: Sequence[Layer]) -> int:
        return sum(int(whole(self._masks[layer.name].sum(dtype=torch.int64))) for layer in layers)

    @torch.no_grad()
    def update(
        self,
        criterion: Criterion,
        pattern: Pattern,
        sparsity: float,
        scope: Scope,
        *,
        targets: Mapping[str, float] | None = None,
        floor: float = 0.0,
        observation: Observation | None = None,
    ) -> None:
        """Drop the lowest scores up to a sparsity; what was dropped before stays dropped.

        Args:
            criterion: Gives the scores.
            pattern: Gives the groups that are kept or dropped together.
            sparsity: Share of the weights to drop in all, cumulative, 0..1.
            scope: ``"global"`` ranks all layers together, ``"layer"`` each layer for itself, ``"erk"`` each layer for
                itself up to a sparsity that depends on its shape.
            targets: Sparsities of single layers by their names; they are ranked for themselves.
            floor: No layer keeps less than this share of what all keep on average; above 0, none is emptied. It does
                not count for ``WholeLayer``, which empties layers.
            observation: What the criterion saw; layers that it cannot score stay as they are.
        """
        layers = [layer for layer in self.layers if observation is None or observation.refuses(layer) is None]
        parts = split_by_scope(layers, sparsity, scope, targets or {})
        parts = [(part, share) for part, share in parts if self._num_open(part, share) > 0]
        streamed = isinstance(pattern, Element) and type(criterion).score_values is not Criterion.score_values
        if not (streamed and self._update_streamed(criterion, parts, floor)):
            for part, share in parts:
                self._update_scored(criterion, pattern, part, share, floor, observation)
        self.apply(layers)

    def _num_open(self, layers: Sequence[Layer], sparsity: float) -> int:
        """How many weights are still to be dropped for a sparsity."""
        num_weights = sum(layer.weight.numel() for layer in layers)
        return num_dropped(sparsity, num_weights) - (num_weights - self._num_kept(layers))

    def _update_scored(
        self,
        criterion: Criterion,
        pattern: Pattern,
        layers: Sequence[Layer],
        sparsity: float,
        floor: float,
        observation: Observation | None,
    ) -> None:
        """Rank the groups of all given layers together; of sharded ones, each process ranks a part."""
        groups, shapes, sizes, ranks = [], [], [], ranks_for(layer.weight for layer in layers)
        for layer in layers:
            weight = layer if observation is None else observation.layer(layer)
            if is_sharded(layer.weight):
                weight = replace(weight, whole=nn.Parameter(whole(layer.weight.detach()), requires_grad=False))
            scores = criterion.score(weight).float()
            scores = scores.masked_fill(whole(self._masks[layer.name]) == 0, -torch.inf)
            # Single weights are ranked as they are stored, so that ties go in the order of the streamed ones.
            scores = scores if isinstance(pattern, Element) else layer.out_first(scores)
            found = pattern.reduce(scores)
            protected = pattern.protects(found)
            if protected is not None:
                found = found.masked_fill(protected & (found > -torch.inf), torch.inf)
            groups.append(ranks.part(found))
            shapes.append((found.shape, scores.shape))
            sizes.append(layer.weight.numel() // found.numel())
        floor = 0.0 if isinstance(pattern, WholeLayer) else floor
        kept = keep_groups(groups, sizes, sparsity, floor, ranks)
        for layer, keep, (shape, full) in zip(layers, kept, shapes, strict=True):
            mask = pattern.expand(ranks.join(keep, shape), full)
            mask = mask if isinstance(pattern, Element) else layer.out_first(mask)
            self._masks[layer.name] *= sharded_as(mask, self._masks[layer.name])

    def _update_streamed(
        self, criterion: Criterion, parts: Sequence[tuple[Sequence[Layer], float]], floor: float
    ) -> bool:
        """The same without holding scores; False, with nothing done, where that cannot be."""
        cuts: list[tuple[Cut, Sequence[Layer]]] = []
        for part, sparsity in parts:
            open_, num_left = list(part), num_dropped(sparsity, sum(layer.weight.numel() for layer in part))
            while open_ and num_left > 0:
                cut = self._find(criterion, num_left, open_)
                if cut is None:
                    return False
                needed = {layer.name: num_needed(floor, sparsity, layer.weight.numel()) for layer in open_}
                short = self._short(cut, criterion, open_, needed) if floor else []
                if not short:
                    cuts.append((cut, open_))
                    break
                for layer in short:
                    k = layer.weight.numel() - needed[layer.name]
                    own = self._find(criterion, k, [layer])
                    if own is None:
                        return False
                    cuts.append((own, [layer]))
                    num_left -= k
                open_ = [layer for layer in open_ if layer not in short]
        for cut, layers in cuts:
            self.write(cut, criterion, layers)
        return True

    def _short(self, cut: Cut, criterion: Criterion, layers: Sequence[Layer], needed: Mapping[str, int]) -> list[Layer]:
        """The layers of which a cut leaves less than what is needed."""
        short = []
        for layer in layers:
            num_kept = 0
            for scores in _chunks(criterion, [layer]):
                num_kept += int(np.count_nonzero(scores > cut.value))
                if num_kept >= needed[layer.name]:
                    break
            if num_kept < needed[layer.name]:
                short.append(layer)
        if not short or cut.num_ties == cut.num_equal:
            return short
        cut, kept, short = replace(cut), np.empty(CHUNK, bool), []  # some of the equal ones are kept: count in order
        for layer in layers:
            num_kept = 0
            for scores in _chunks(criterion, [layer]):
                cut.keep(scores, kept[: len(scores)])
                num_kept += int(np.count_nonzero(kept[: len(scores)]))
            if num_kept < needed[layer.name]:
                short.append(layer)
        return short

    @torch.no_grad()
    def exchange(self, layers: Iterable[Layer], share: float, growth: Callable[[Layer], Tensor]) -> dict[str, Tensor]:
        """Drop the smallest of the kept weights and let as many others grow from 0: the sparsity of each layer stays.

        Args:
            layers: Where.
            share: Share of the kept weights that is exchanged, 0..1.
            growth: Scores of a layer's weights; the highest grow, those just dropped among them.

        Returns:
            By layer, int8, where weights have newly grown (1).
        """
        grown = {}
        for layer in layers:
            mask = whole(self._masks[layer.name]).flatten().bool()
            k = int(share * int(mask.sum()))
            size = whole(layer.weight.detach()).flatten().abs().masked_fill(~mask, torch.inf)
            kept = mask.clone()
            kept[size.topk(k, largest=False).indices] = False
            scores = whole(growth(layer)).flatten().float().masked_fill(kept, -torch.inf)
            kept[scores.topk(k).indices] = True
            new = (kept & ~mask).view(layer.weight.shape).to(torch.int8)
            grown[layer.name] = sharded_as(new, self._masks[layer.name])
            self._masks[layer.name].copy_(sharded_as(kept.view(layer.weight.shape), self._masks[layer.name]))
        self.apply(layers)
        return grown

    def find(self, criterion: Criterion, sparsity: float, layers: Sequence[Layer]) -> Cut | None:
        """The cut through the scores of all given layers, without holding the scores.

        Args:
            criterion: One that scores values.
            sparsity: Share of the weights to drop, 0..1.
            layers: The layers that are ranked together.

        Returns:
            None where weights are not plain float32 on the CPU, or where the cut falls among zeros: dropped weights are
            zeros, and among zeros only the masks tell which were dropped before.
        """
        return self._find(criterion, num_dropped(sparsity, sum(layer.weight.numel() for layer in layers)), layers)

    def _find(self, criterion: Criterion, k: int, layers: Sequence[Layer]) -> Cut | None:
        weights = [layer.weight.detach() for layer in layers]
        plain = (w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous() for w in weights)
        if not all(plain) or any(map(is_sharded, weights)):
            return None
        num_weights = sum(w.numel() for w in weights)

        def sample() -> np.ndarray:
            values = torch.from_numpy(spread_sample([w.view(-1).numpy() for w in weights], num_weights))
            return criterion.score_values(values, values).numpy()

        cut = find_cut(partial(_chunks, criterion, layers), num_weights, k, sample)
        return cut if cut.value > 0 else None

    def write(self, cut: Cut, criterion: Criterion, layers: Sequence[Layer]) -> None:
        """Drop what a cut through the layers' scores drops."""
        kept = np.empty(CHUNK, bool)
        for layer in layers:
            mask = self._masks[layer.name].view(-1).numpy().view(bool)
            for i, scores in enumerate(_chunks(criterion, [layer])):
                cut.keep(scores, kept[: len(scores)])
                mask[i * CHUNK : i * CHUNK + len(scores)] &= kept[: len(scores)]

    @torch.no_grad()
    def apply(self, layers: Iterable[Layer] | None = None) -> None:
        """Zero the dropped weights of the given layers (of all, without an argument), as +0."""
        for layer in self.layers if layers is None else layers:
            layer.weight.mul_(self._masks[layer.name]).add_(0.0)

    @torch.no_grad()
    def enforce(self, layers: Iterable[Layer]) -> None:
        """The same in one pass over the weights, for after every optimizer step; a zero may be -0."""
        for layer in layers:
            if layer.name in self._masks:
                layer.weight.mul_(self._masks[layer.name])

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Zero the gradients of the dropped weights, so that they do not count in a clipped norm."""
        for layer in self.layers:
            if layer.weight.grad is not None:
                layer.weight.grad.mul_(self._masks[layer.name])

    @torch.no_grad()
    def apply_to_copy(self, model: nn.Module) -> None:
        """Zero the dropped weights in a copy of the model, such as an average of its weights."""
        copies = dict(model.named_parameters())
        names = {id(layer.weight): layer.name for layer in self.layers}
        for name, parameter in self._named_parameters:
            if id(parameter) in names and name in copies:
                copies[name].mul_(self._masks[names[id(parameter)]].to(copies[name].device)).add_(0.0)

    def bind(self, model: nn.Module) -> None:
        """Remember the parameter names of the model, and follow its device."""
        self._named_parameters = list(model.named_parameters())
        for layer in self.layers:
            self._masks[layer.name] = self._masks[layer.name].to(layer.weight.device)

    def state_dict(self) -> dict[str, Any]:
        """The masks, eight weights a byte, with their shapes."""
        return {name: {"bits": _pack(whole(mask)), "shape": list(mask.shape)} for name, mask in self._masks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the masks of a checkpoint.

        Raises:
            ValueError: If the layers or their shapes are not those of the checkpoint.
        """
        ours = {name: list(mask.shape) for name, mask in self._masks.items()}
        theirs = {name: entry["shape"] for name, entry in state.items()}
        if ours != theirs:
            different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise ValueError(
                f"The checkpoint holds masks of another structure. It differs at: {', '.join(different[:8])}. "
                "Resume with the same model and the same include and exclude patterns."
            )
        for name, entry in state.items():
            mask = _unpack(entry["bits"], entry["shape"]).to(self._masks[name].device)
            self._masks[name] = sharded_as(mask, self._masks[name])

    def follow(self, model: nn.Module, record: Record) -> None:
        """Shrink with the weights of a model that has just changed its shape."""
        present, kept = {id(p) for p in model.parameters()}, kept_by_id(model, record)
        self.layers = [layer for layer in self.layers if id(layer.weight) in present]
        self._masks = {layer.name: self._masks[layer.name] for layer in self.layers}
        for layer in self.layers:
            for axis, indices in kept.get(id(layer.weight), {}).items():
                mask = self._masks[layer.name]
                self._masks[layer.name] = mask.index_select(axis, indices.to(mask.device)).contiguous()
        self.bind(model)


def _chunks(criterion: Criterion, layers: Sequence[Layer]) -> Iterator[np.ndarray]:
    """The scores of the layers' weights, in order, in one buffer that is used again and again."""
    buffer = torch.empty(CHUNK)
    for layer in layers:
        for part in layer.weight.detach().view(-1).split(CHUNK):
            yield criterion.score_values(part, buffer[: part.numel()]).numpy()


def _pack(mask: Tensor) -> Tensor:
    bits = torch.nn.functional.pad(mask.detach().cpu().flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    num_weights = int(torch.Size(shape).numel())
    unpacked = (bits.cpu().unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return unpacked.flatten()[:num_weights].view(*shape).to(torch.int8)
