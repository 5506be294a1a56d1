"""A model's forward that computes anew only what depends on one weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from lightning_compress.deploy.graph import capture, tensors_of
from lightning_compress.forward import Inputs, replaced_forward

__all__ = ["Replay"]


class Replay:
    """Evaluates a model again and again on the same batches while one weight changes.

    The first pass over the batches remembers what the weight does not touch; the others start from there. What is
    remembered is dropped with the weight's turn, and given up where it outgrows the memory allowed.

    Args:
        model: In eval mode on the CPU.
        inputs: Example inputs of its forward.
        max_bytes: How much may be remembered.

    Raises:
        Exception: Whatever torch.export says of a model that it cannot capture.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, max_bytes: int = 1 << 30) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.graph: GraphModule = capture(model, inputs, dynamic=True)
        self._names = {str(n.target).removeprefix("model."): n for n in self.graph.graph.nodes if n.op == "get_attr"}
        self._of: Node | None = None
        self._weight: Tensor | None = None
        self._kept: list[tuple[tuple[Tensor, ...], dict[Node, Any]]] = []
        self._idle: list[Node] = []
        self._border: list[Node] = []
        self._num_calls = 0
        self._num_bytes = 0

    @contextmanager
    def of(self, name: str, weight: Tensor) -> Iterator[bool]:
        """While it lasts the model's forward is this one, for a weight that changes in place.

        Args:
            name: Name of the parameter.
            weight: The parameter.

        Yields:
            Whether the weight was found in the graph; otherwise the forward stays as it is.
        """
        node = self._names.get(name)
        if node is None:
            yield False
            return
        self._of = node
        self._weight = weight
        self._idle, self._border = _sides(self.graph, node)
        try:
            with replaced_forward(self.model, self):
                yield True
        finally:
            self._of = None
            self._weight = None
            self._kept = []
            self._num_bytes = 0

    def begin(self) -> None:
        """A pass over the batches begins."""
        self._num_calls = 0

    @torch.no_grad()
    def __call__(self, *args: object, **kwargs: object) -> Any:
        """The model's outputs."""
        assert self._of is not None
        tensors = tensors_of(Inputs(args, kwargs))
        turn = self._num_calls
        self._num_calls += 1
        known: dict[Node, Any] = {}
        if turn < len(self._kept) and _same(self._kept[turn][0], tensors):
            known = {**dict.fromkeys(self._idle), **self._kept[turn][1]}  # what is in here is not computed
        interpreter = _Keeping(self.graph, [] if known else self._border)
        out = interpreter.run(*tensors, initial_env={**known, self._of: self._weight})
        if turn == len(self._kept) and self._num_bytes < self.max_bytes:
            self._num_bytes += sum(getattr(x, "nbytes", 0) for x in tree_leaves(list(interpreter.kept.values())))
            self._kept.append((tensors, interpreter.kept))
        return out


class _Keeping(Interpreter):
    """Keeps the values of some nodes."""

    def __init__(self, graph: GraphModule, nodes: Sequence[Node]) -> None:
        super().__init__(graph)
        self._wanted = set(nodes)
        self.kept: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        if n in self._wanted:
            self.kept[n] = value
        return value


def _sides(graph: GraphModule, changed: Node) -> tuple[list[Node], list[Node]]:
    """What is computed without a node; and of that, what is read by something that depends on the node."""
    depends = {changed}
    for node in graph.graph.nodes:
        if any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    idle = [node for node in graph.graph.nodes if node not in depends and node.op not in ("placeholder", "output")]
    return idle, [node for node in idle if any(user in depends for user in node.users)]


def _same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))
