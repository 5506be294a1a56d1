"""Which weights a training step multiplies with: counted below autograd, by nothing that the callbacks share.

Every operation of one step is seen by a dispatch mode. What is computed from parameters alone (a transpose, a cast, a
weight norm) still stands for them; where such a value meets the data in a product or a convolution, they multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Multiplied", "multiplied"]

# the overload packets' names, and which of their tensors are factors
_FACTORS: dict[str, slice] = {
    "mm": slice(0, 2),
    "bmm": slice(0, 2),
    "mv": slice(0, 2),
    "dot": slice(0, 2),
    "addmm": slice(1, 3),
    "addmv": slice(1, 3),
    "baddbmm": slice(1, 3),
    "addbmm": slice(1, 3),
    "linear": slice(0, 2),
    "_grouped_mm": slice(0, 2),
    "convolution": slice(0, 2),
    "convolution_overrideable": slice(0, 2),
    "_scaled_dot_product_flash_attention_for_cpu": slice(0, 3),
}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_layer", "_thnn_fused")
_LOOKUPS = ("embedding", "_embedding_bag", "_embedding_bag_forward_only")


class Multiplied(TorchDispatchMode):
    """Notes which parameters meet the data in products, and which ones are looked up.

    Args:
        model: The model whose parameters are followed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = dict(model.named_parameters())
        self.factors: set[str] = set()
        self.looked_up: set[str] = set()
        self._held: list[Tensor] = []  # keeps storages alive, so that no other tensor takes their place
        self._stands_for: dict[int, frozenset[str]] = {}
        for name, p in self.parameters.items():
            key = _storage(p)
            self._stands_for[key] = self._stands_for.get(key, frozenset()) | {name}
        for buffer in model.buffers():
            self._stands_for.setdefault(_storage(buffer), frozenset())
            self._held.append(buffer)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note what its tensors stand for."""
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = [self._stands_for.get(_storage(x)) for x in inputs]
        if name in _FACTORS:
            self._note(known[_FACTORS[name]])
        elif any(part in name for part in _RECURRENT):
            self._note(known)
        elif name in _LOOKUPS:
            self.looked_up |= known[0] or frozenset()
        elif all(found is not None for found in known):
            self._remember(out, frozenset().union(*(found or () for found in known)))
        elif func._schema.is_mutable:  # noqa: SLF001  # data were written into what was none
            self._forget(out)
        return out

    def _note(self, known: list[frozenset[str] | None]) -> None:
        self.factors |= {p for found in known for p in found or () if self.parameters[p].dim() > 1}

    def _remember(self, out: Any, names: frozenset[str]) -> None:
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _storage(x) not in self._stands_for:
                self._stands_for[_storage(x)] = names
                self._held.append(x)

    def _forget(self, out: Any) -> None:
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._stands_for.pop(_storage(x), None)


def multiplied(model: nn.Module, step: Callable[[], object]) -> dict[str, nn.Parameter]:
    """The trainable weights of two or more axes that a step multiplies the data with, by name.

    Embeddings are left out, as are weights that a model holds in several places.

    Args:
        model: The model.
        step: Runs it as training does.
    """
    mode = Multiplied(model)
    with mode:
        step()
    apart = _tied(model) | {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    return {
        name: p
        for name, p in mode.parameters.items()
        if name in mode.factors and p.requires_grad and name not in mode.looked_up and id(p) not in apart
    }


def _tied(model: nn.Module) -> set[int]:
    places: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                places.setdefault(id(p), set()).add((id(module), key))
    return {key for key, held in places.items() if len(held) > 1}


def _storage(x: Tensor) -> int:
    try:
        return x.untyped_storage().data_ptr() or -id(x)
    except (RuntimeError, NotImplementedError):  # of a sparse tensor
        return -id(x)
