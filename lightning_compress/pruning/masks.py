"""What is masked: one mask per layer, enforced on the weights, saved, and cut with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.checks import check_list
from lightning_compress.layers import Layer
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.observation import Observation
from lightning_compress.pruning.patterns import Element, Pattern
from lightning_compress.pruning.scopes import Scope, split_by_scope
from lightning_compress.pruning.sharding import sharded_as, whole
from lightning_compress.pruning.threshold import num_dropped
from lightning_compress.pruning.updates import NotStreamable, update_held, update_streamed
from lightning_compress.structure.held import scale_state, states_of
from lightning_compress.structure.mirrors import find_mirrors
from lightning_compress.structure.record import Record, kept_by_id

__all__ = ["Masks"]


class Masks:
    """One mask per layer, int8 with 1 = kept: the cheapest kind to multiply into a weight in place.

    The mask of a sharded weight is sharded like it: then all processes call ``update``, ``exchange`` and ``state_dict``
    together, and the state is the same on all of them. ``sparsity`` each process may ask for by itself, also when the
    others are gone.

    Args:
        layers: The layers that are pruned.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        check_list("Masks.layers", layers, Layer, "a Layer of find_layers")
        self.layers = list(layers)
        self._masks = {layer.name: torch.ones_like(layer.weight, dtype=torch.int8) for layer in layers}
        self._kept = {layer.name: layer.weight.numel() for layer in layers}  # how many weights, in all processes

    def are_of(self, layers: Sequence[Layer]) -> bool:
        """Whether these are the masks of exactly these weights."""
        return [id(layer.weight) for layer in layers] == [id(layer.weight) for layer in self.layers]

    @property
    def sparsity(self) -> float:
        """Share of the weights that is dropped."""
        return self.sparsity_of(self.layers)

    def sparsity_of(self, layers: Sequence[Layer]) -> float:
        """Share of the weights of some of the layers that is dropped; 0 of none."""
        if not layers:
            return 0.0
        return 1 - self._num_kept(layers) / max(1, sum(self._masks[layer.name].numel() for layer in layers))

    def _num_kept(self, layers: Sequence[Layer]) -> int:
        return sum(self._kept[layer.name] for layer in layers)

    def _count(self, layers: Iterable[Layer]) -> None:
        """Count what is kept; an exchange keeps as many as were."""
        self._kept |= {x.name: int(whole(self._masks[x.name].sum(dtype=torch.int64))) for x in layers}

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
            scope: ``"global"`` ranks all layers together, ``"layer"`` each layer by itself, ``"erk"`` each layer by
                itself up to a sparsity that depends on its shape.
            targets: Sparsities of single layers by their names; each is ranked by itself.
            floor: Smallest share of what all layers keep on average that a layer keeps; above 0, none is emptied.
                ``WholeLayer``, which empties layers, ignores it.
            observation: What the criterion saw; layers that it cannot score stay as they are.
        """
        layers = [layer for layer in self.layers if observation is None or observation.refuses(layer) is None]
        parts = split_by_scope(layers, sparsity, scope, targets or {})
        # A part that has dropped enough is left alone: an update to the same sparsity again must drop nothing more.
        parts = [(part, share) for part, share in parts if self._num_open(part, share) > 0]
        if not self._streams(criterion, pattern, parts, floor):
            for part, share in parts:
                update_held(self._masks, criterion, pattern, part, share, floor, observation)
        self._keep_finite(layer for part, _ in parts for layer in part)
        self._count(layer for part, _ in parts for layer in part)
        self.apply(layers)

    def _streams(
        self,
        criterion: Criterion,
        pattern: Pattern,
        parts: Sequence[tuple[Sequence[Layer], float]],
        floor: float,
    ) -> bool:
        """Update without holding scores; False, with nothing done, where that cannot be."""
        if not isinstance(pattern, Element) or type(criterion).score_values is Criterion.score_values:
            return False
        try:
            update_streamed(self._masks, criterion, parts, floor)
        except NotStreamable:
            return False
        return True

    def _num_open(self, layers: Sequence[Layer], sparsity: float) -> int:
        """How many weights are still to be dropped for a sparsity."""
        num_weights = sum(layer.weight.numel() for layer in layers)
        return num_dropped(sparsity, num_weights) - (num_weights - self._num_kept(layers))

    @torch.no_grad()
    def exchange(self, layers: Sequence[Layer], share: float, growth: Callable[[Layer], Tensor]) -> dict[str, Tensor]:
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
        self._keep_finite(layers)
        self._count(layer for layer in layers if layer.source)
        self.apply(layers)
        return grown

    def _keep_finite(self, layers: Iterable[Layer]) -> None:
        """Keep the largest weight of a row that nothing is left of, where a norm would divide by its length.

        The smallest others of the layer go in their place.
        """
        for layer in layers:
            for _ in range(_TRIES if layer.source else 0):
                back = _needed(layer, self._masks[layer.name])
                if not back.any():
                    break
                _exchanged(layer, self._masks[layer.name], back)

    @torch.no_grad()
    def apply(self, layers: Iterable[Layer] | None = None) -> None:
        """Zero the dropped weights of the given layers (of all, without an argument), as +0."""
        for layer in self.layers if layers is None else layers:
            # A negative weight times 0 is -0; adding 0 makes it +0, so that files and bit comparisons see one zero.
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

    @torch.no_grad()
    def apply_to_mirrors(self, model: nn.Module) -> None:
        """Zero the dropped weights in averages that the model keeps of its own parts."""
        params = dict(model.named_parameters(remove_duplicate=False))
        masks = {id(layer.weight): self._masks[layer.name] for layer in self.layers}
        for copy, source in find_mirrors(model).items():
            for name, p in model.get_submodule(copy).named_parameters():
                mask = masks.get(id(params.get(f"{source}.{name}")))
                if mask is not None:
                    p.mul_(mask.to(p.device)).add_(0.0)

    @torch.no_grad()
    def apply_to_states(self, optimizers: Iterable[Optimizer]) -> None:
        """Zero what optimizers keep of the dropped weights, such as a second copy of them.

        Args:
            optimizers: Those whose state has the weights' shapes.
        """
        masks = {id(layer.weight): self._masks[layer.name] for layer in self.layers}
        for optimizer in optimizers:
            for _, p, state in states_of(optimizer):
                if id(p) in masks:
                    scale_state(state, p, masks[id(p)])

    def bind(self, model: nn.Module) -> None:
        """Remember the parameter names of the model, and follow its device."""
        self._named_parameters = list(model.named_parameters())
        for layer in self.layers:
            self._masks[layer.name] = self._masks[layer.name].to(layer.weight.device)

    def state_dict(self) -> dict[str, Any]:
        """The masks, eight weights per byte, with their shapes."""
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
        self._count(self.layers)

    def follow(self, model: nn.Module, record: Record) -> None:
        """Shrink with the weights of a model that has just changed its shape."""
        present = {id(p) for p in model.parameters()}
        kept = kept_by_id(model, record)
        self.layers = [layer for layer in self.layers if id(layer.weight) in present]
        self._masks = {layer.name: self._masks[layer.name] for layer in self.layers}
        for layer in self.layers:
            for axis, indices in kept.get(id(layer.weight), {}).items():
                mask = self._masks[layer.name]
                self._masks[layer.name] = mask.index_select(axis, indices.to(mask.device)).contiguous()
        self.bind(model)
        self._count(self.layers)


_TRIES = 4  # what goes in the place of others may be the last of another row


def _needed(layer: Layer, mask: Tensor) -> Tensor:
    """The largest weight of each row that holds what is not finite where the mask is applied."""
    held = layer.weight.data
    layer.weight.data = held * mask
    bad = ~torch.isfinite(layer.multiplied)
    layer.weight.data = held
    sizes = held.abs().masked_fill(~bad, -1).flatten(1)
    largest = torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, sizes.argmax(1, keepdim=True), True)
    return (largest & bad.flatten(1)).view(mask.shape)


def _exchanged(layer: Layer, mask: Tensor, back: Tensor) -> None:
    """Keep some, and drop as many of the smallest that are not the largest of their row."""
    mask.masked_fill_(back, 1)
    sizes = layer.weight.detach().abs().masked_fill(mask == 0, -1).flatten(1)
    others = sizes.scatter(1, sizes.argmax(1, keepdim=True), -1).masked_fill(back.flatten(1), -1)
    num = min(int(back.sum()), int((others >= 0).sum()))
    dropped = others.masked_fill(others < 0, torch.inf).flatten().topk(num, largest=False).indices
    mask.view(-1)[dropped] = 0


def _pack(mask: Tensor) -> Tensor:
    bits = torch.nn.functional.pad(mask.detach().cpu().flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    num_weights = int(torch.Size(shape).numel())
    unpacked = (bits.cpu().unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return unpacked.flatten()[:num_weights].view(*shape).to(torch.int8)
