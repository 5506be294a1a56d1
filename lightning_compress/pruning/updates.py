"""How masks are chosen anew: from scores that are streamed in chunks, or held where a criterion needs whole layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.layers import Layer
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.observation import Observation
from lightning_compress.pruning.patterns import Element, Pattern, WholeLayer
from lightning_compress.pruning.scopes import choose_with_floor, keep_groups, num_needed
from lightning_compress.pruning.sharding import is_sharded, processes_for, sharded_as, whole
from lightning_compress.pruning.threshold import CHUNK, Threshold, find_threshold, num_dropped, spread_sample

__all__ = ["NotStreamable", "Streamed", "update_held", "update_streamed"]


class NotStreamable(Exception):
    """Scores that have to be held: of weights that are not plain float32 on the CPU, or with the threshold at zero.

    Dropped weights are zeros, and among zeros only the masks tell which were dropped before.
    """


def update_streamed(
    masks: Mapping[str, Tensor],
    criterion: Criterion,
    parts: Sequence[tuple[Sequence[Layer], float]],
    floor: float,
) -> None:
    """Drop the lowest scores of each part up to its sparsity, without holding them.

    Args:
        masks: Int8, 1 = kept, by the layers' names; changed in place.
        criterion: One that scores values.
        parts: Layers that are ranked together, with a sparsity.
        floor: Smallest share of what all layers of a part keep on average that a layer keeps.

    Raises:
        NotStreamable: With nothing done, if the scores of a part have to be held.
    """
    chosen = []
    for layers, sparsity in parts:
        needed = [num_needed(floor, sparsity, layer.weight.numel()) for layer in layers]
        streamed = Streamed(criterion, layers, needed)
        k = num_dropped(sparsity, sum(layer.weight.numel() for layer in layers))
        chosen.append((streamed, choose_with_floor(streamed, len(layers), k)))
    # Not before all parts are chosen: a part that cannot be streamed must find the masks as they were.
    for streamed, choices in chosen:
        for threshold, members in choices:
            streamed.write(masks, threshold, members)


class Streamed:
    """Scores that are computed anew in chunks whenever they are looked at; a choice is a threshold.

    Args:
        criterion: One that scores values.
        layers: The layers.
        needed: Number of weights that each keeps at least; without it, none.
    """

    def __init__(self, criterion: Criterion, layers: Sequence[Layer], needed: Sequence[int] = ()) -> None:
        self.criterion = criterion
        self.layers = layers
        self.needed = needed or [0] * len(layers)
        weights = [layer.weight.detach() for layer in layers]
        plain = (w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous() for w in weights)
        if not all(plain) or any(map(is_sharded, weights)):
            raise NotStreamable

    def drop_lowest(self, members: Sequence[int], num_weights: float) -> Threshold:
        """The threshold below which exactly a number of the layers' weights lie."""
        weights = [self.layers[i].weight.detach() for i in members]
        total = sum(w.numel() for w in weights)

        def sample() -> np.ndarray:
            values = torch.from_numpy(spread_sample([w.view(-1).numpy() for w in weights], total))
            return self.criterion.score_values(values, values).numpy()

        threshold = find_threshold(partial(self._chunks, members), total, int(num_weights), sample)
        if threshold.value <= 0:
            raise NotStreamable
        return threshold

    def short(self, choice: Threshold, members: Sequence[int]) -> list[int]:
        """The layers of which less weights are kept than they need."""
        short = [i for i in members if self._num_above(choice.value, i) < self.needed[i]]
        if not short or choice.num_ties == choice.num_equal:
            return short
        # Some of the equal ones are kept, in order: they are counted from the first layer on.
        ties = replace(choice)
        kept = np.empty(CHUNK, bool)
        short = []
        for i in members:
            num_kept = 0
            for scores in self._chunks([i]):
                ties.mark_kept(scores, kept[: len(scores)])
                num_kept += int(np.count_nonzero(kept[: len(scores)]))
            if num_kept < self.needed[i]:
                short.append(i)
        return short

    def _num_above(self, value: float, member: int) -> int:
        """Scores above a value, as many as are needed: counting stops there."""
        num = 0
        if self.needed[member]:
            for scores in self._chunks([member]):
                num += int(np.count_nonzero(scores > value))
                if num >= self.needed[member]:
                    break
        return num

    def keep_needed(self, member: int) -> tuple[Threshold, float]:
        """Keep the highest, as many as are needed."""
        k = self.layers[member].weight.numel() - self.needed[member]
        return self.drop_lowest([member], k), k

    def write(self, masks: Mapping[str, Tensor], threshold: Threshold, members: Sequence[int]) -> None:
        """Drop from masks what a threshold drops; it is used up by that."""
        kept = np.empty(CHUNK, bool)
        for i in members:
            mask = masks[self.layers[i].name].view(-1).numpy().view(bool)
            for number, scores in enumerate(self._chunks([i])):
                threshold.mark_kept(scores, kept[: len(scores)])
                mask[number * CHUNK : number * CHUNK + len(scores)] &= kept[: len(scores)]

    def _chunks(self, members: Sequence[int]) -> Iterator[np.ndarray]:
        """The scores of the layers' weights, in order, in one buffer that is used again and again."""
        buffer = torch.empty(CHUNK)
        for i in members:
            for part in self.layers[i].weight.detach().view(-1).split(CHUNK):
                yield self.criterion.score_values(part, buffer[: part.numel()]).numpy()


def update_held(
    masks: Mapping[str, Tensor],
    criterion: Criterion,
    pattern: Pattern,
    layers: Sequence[Layer],
    sparsity: float,
    floor: float,
    observation: Observation | None,
) -> None:
    """Rank the groups of all given layers together; of sharded ones, each process ranks a part.

    Args:
        masks: Int8, 1 = kept, by the layers' names; changed in place.
        criterion: Gives the scores.
        pattern: Gives the groups.
        layers: The layers.
        sparsity: Share of their weights to drop in all.
        floor: Smallest share of what all layers keep on average that a layer keeps.
        observation: What the criterion saw.
    """
    processes = processes_for(layer.weight for layer in layers)
    groups = []
    shapes = []
    sizes = []
    for layer in layers:
        scores = _scores(masks[layer.name], criterion, layer if observation is None else observation.layer(layer))
        # Single weights are ranked as they are stored, so that ties go in the order in which they are streamed.
        scores = scores if isinstance(pattern, Element) else layer.out_first(scores)
        found = pattern.reduce(scores)
        protected = pattern.protects(found)
        if protected is not None:
            found = found.masked_fill(protected & (found > -torch.inf), torch.inf)
        groups.append(processes.part(found))
        shapes.append((found.shape, scores.shape))
        sizes.append(layer.weight.numel() // found.numel())
    floor = 0.0 if isinstance(pattern, WholeLayer) else floor
    kept = keep_groups(groups, sizes, sparsity, floor, processes)
    for layer, keep, (shape, full) in zip(layers, kept, shapes, strict=True):
        mask = pattern.expand(processes.join(keep, shape), full)
        mask = mask if isinstance(pattern, Element) else layer.as_stored(mask)
        masks[layer.name].mul_(sharded_as(mask, masks[layer.name]))


def _scores(mask: Tensor, criterion: Criterion, layer: Layer) -> Tensor:
    """A layer's scores, gathered from all processes; -inf for what was dropped before, so that it goes first again."""
    if is_sharded(layer.weight):
        layer = replace(layer, whole=nn.Parameter(whole(layer.weight.detach()), requires_grad=False))
    return criterion.score(layer).float().masked_fill(whole(mask) == 0, -torch.inf)
