"""What torch's operations do to axes: one function per kind, by the operation's name in ATen."""

from __future__ import annotations

from lightning_compress.structure.rules import layers, picks, reductions, same, views
from lightning_compress.structure.rules.call import Call, Rule

__all__ = ["RULES", "Call", "Rule"]

RULES: dict[str, Rule] = {**views.RULES, **layers.RULES, **reductions.RULES, **picks.RULES, **same.RULES}
