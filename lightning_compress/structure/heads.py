"""Attentions, and which linear layers make their queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.layers import matches, plain_name

__all__ = ["Attention", "find_attentions"]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "nheads", "num_head", "h")
_SPLIT = {"q", "k", "v", "query", "key", "value", "wq", "wk", "wv"}
_FUSED = {"qkv": 3, "to_qkv": 3, "in_proj": 3, "c_attn": 3, "query_key_value": 3, "wqkv": 3, "kv": 2, "to_kv": 2}


@dataclass
class Attention:
    """An attention whose heads are removed as a whole.

    Args:
        name: The module that knows the number of heads.
        layers: Its linear layers that make queries, keys and values, with how many of these each makes.
        num_heads: How many heads there are.
        head_dim: Channels per head.
        attributes: Its attributes that hold the number of heads.
        sizes: Its attributes that hold the channels of all heads together.
    """

    name: str
    layers: dict[str, int]
    num_heads: int
    head_dim: int
    attributes: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()


def find_attentions(modules: Mapping[str, nn.Module], num_heads: Mapping[str, int]) -> dict[str, Attention]:
    """Attentions by the name of each of their layers."""
    found: dict[str, Attention] = {}
    for pattern in num_heads:
        if not any(matches(plain_name(name), [pattern]) for name in modules):
            raise ValueError(
                f"num_heads={pattern!r} matches no module. Give the name of an attention or a glob such as '*.attn'."
            )
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            continue
        given = next((num for pattern, num in num_heads.items() if matches(plain_name(name), [pattern])), None)
        ints = {k: v for k, v in vars(module).items() if isinstance(v, int) and not isinstance(v, bool)}
        keys = [key for key in _HEADS if ints.get(key, 0) > 0]
        heads = given or (ints[keys[0]] if keys else 0)
        makes: dict[str, int] = {}
        for key, child in module.named_children():
            plain = key.lower()
            stem = plain.removesuffix("_proj").removesuffix("_linear").removeprefix("to_").removeprefix("w_")
            times = _FUSED.get(plain) or _FUSED.get(stem) or (1 if plain in _SPLIT or stem in _SPLIT else 0)
            if isinstance(child, nn.Linear) and times and heads and child.out_features % (times * heads) == 0:
                makes[f"{name}.{key}".lstrip(".")] = times
        if not makes:
            continue
        linears: list[Any] = [modules[key] for key in makes]
        sizes = {linear.out_features // times for linear, times in zip(linears, makes.values(), strict=True)}
        if len(sizes) == 1:
            (size,) = sizes
            counts = tuple(key for key, value in ints.items() if value == heads and (key in _HEADS or given))
            inner = tuple(key for key, value in ints.items() if value == size and key not in counts)
            attention = Attention(name, makes, heads, size // heads, counts, inner)
            found |= dict.fromkeys(makes, attention)
    return found
