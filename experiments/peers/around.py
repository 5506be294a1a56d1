"""A module around a model, for tools that cannot take, or do not give, a plain one."""

from __future__ import annotations

from torch import Tensor, nn


class Around(nn.Module):
    """Answers as the model does.

    Args:
        model: Kept as the attribute of that name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The model's outputs."""
        outputs: Tensor = self.model(x)
        return outputs
