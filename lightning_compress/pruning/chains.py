"""What follows a layer, so that a criterion can see its activations: a batch norm and an activation function."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_compress.functions import ACTIVATIONS
from lightning_compress.trace import Ran, Trace, Value, find_norms

__all__ = ["Chain", "find_chains"]


@dataclass
class Chain:
    """What follows a layer.

    Args:
        norm: Name of the batch norm that reads the layer's output.
        activation: Name of the function that reads the output of the layer or of its batch norm.
        arguments: What the function is called with besides, such as a slope.
        options: The same by name.
    """

    norm: str = ""
    activation: str = ""
    arguments: list[object] = field(default_factory=list)
    options: dict[str, object] = field(default_factory=dict)

    def activate(self, values: Tensor) -> Tensor:
        """What the activation function makes of values."""
        if not self.activation:
            return values
        return ACTIVATIONS[self.activation](values, *self.arguments, **self.options)


def find_chains(trace: Trace, layers: Mapping[str, str], norms: Collection[str]) -> dict[str, Chain]:
    """What follows each layer: a batch norm, an activation function, both, or nothing that is known here.

    Args:
        trace: Of one batch, from :class:`lightning_compress.watch.Watch`.
        layers: Names of the layers by the names of their modules.
        norms: Names of the batch norms.
    """
    norm_of, layer_of = find_norms(trace, layers, norms)
    chains = {layer: Chain(norm_of.get(name, "")) for name, layer in layers.items()}
    for event in trace.events:
        # of one tensor alone: a trace holds no second one that the function could be called with again
        if not isinstance(event, Ran) or event.name not in ACTIVATIONS or len(event.reads) != 1:
            continue
        read = event.args[0] if event.args else event.kwargs.get("input")
        if not isinstance(read, Value) or read.number not in layer_of:
            continue
        chain = chains[layers[layer_of[read.number]]]
        if not chain.activation:
            chain.activation = event.name
            # whether it works in place says nothing about its values
            chain.arguments = [value for value in event.args[1:] if not isinstance(value, bool)]
            chain.options = {key: value for key, value in event.kwargs.items() if key not in ("input", "inplace")}
    return chains
