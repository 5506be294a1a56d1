"""The teacher of a model: the model as it was, a checkpoint of it, or another module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_compress.checkpoint import check_structure, follow_structure
from lightning_compress.distillation import Call, teach, visible_modules
from lightning_compress.quantization.convert import to_float
from lightning_compress.structure.record import restore_structure, structure_of

__all__ = ["Teacher"]


class Teacher:
    """A module that answers what the model is asked.

    Args:
        source: ``"self"``, the path of a checkpoint, or a module.
        pl_module: The model that is taught.

    Raises:
        ValueError: If the checkpoint cannot be read or does not fit, or the module shares parameters with the model.
    """

    def __init__(self, source: str | Path | nn.Module, pl_module: pl.LightningModule) -> None:
        self.is_copy = not isinstance(source, nn.Module)
        if isinstance(source, nn.Module):
            ours = {id(p) for p in pl_module.parameters()}
            if any(id(p) in ours for p in source.parameters()):
                raise ValueError(
                    "KnowledgeDistillation.teacher shares parameters with the model it teaches. Give teacher='self', "
                    "or copy.deepcopy of it."
                )
            self.module = source.eval()
            return
        copy = to_float(pl_module)
        copy._metric_attributes = None  # noqa: SLF001  # a cache of the original's metrics by identity
        if source != "self":
            _load(copy, Path(source))
        self.module = copy.requires_grad_(False)

    def modules(self) -> dict[str, nn.Module]:
        """Its submodules whose calls can be seen, by name."""
        return visible_modules(self.module)

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Become what the model is now, the same on all ranks."""
        self.become(structure_of(pl_module), pl_module.state_dict())
        if trainer.world_size > 1:  # statistics of batch norms differ between ranks
            buffers = {name: value.cpu() for name, value in self.module.named_buffers()}
            for name, value in trainer.strategy.broadcast(buffers).items():
                self.module.get_buffer(name).copy_(value)

    def become(self, structure: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
        """Take the weights of the model from when it had another structure, or the same."""
        restore_structure(self.module, structure, weights)
        self.module.load_state_dict(weights)

    def place(self, name: str) -> str:
        """Name of a feature in it: the same, or what remains where it is but a part of the model."""
        places = self.modules()
        found = [n for n in places if name == n or (n and name.endswith(f".{n}"))]
        if not found:
            raise ValueError(
                f"KnowledgeDistillation.features={name!r}: the teacher has no such module. It has: "
                f"{', '.join(n for n in places if n)}."
            )
        return max(found, key=len)

    def answer(self, call: Call, features: Iterable[str] = ()) -> Call:
        """What it says to a call of the model, with the outputs of its own layers of these names."""
        places = self.modules()
        asked = places[call.name] if self.is_copy else self.module
        return teach(asked, {name: places[self.place(name)] for name in features}, call)


def _load(copy: pl.LightningModule, path: Path) -> None:
    """Give a copy of the model the weights of a checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        follow_structure(copy, checkpoint)
    except Exception as error:
        raise ValueError(
            f"KnowledgeDistillation.teacher={str(path)!r} cannot be read: {type(error).__name__}: {error}. Accepted is "
            "a .ckpt file that Lightning wrote, with plain values."
        ) from error
    weights = checkpoint["state_dict"]
    check_structure(copy, weights, strict=copy.strict_loading)
    copy.load_state_dict(weights, strict=copy.strict_loading)
