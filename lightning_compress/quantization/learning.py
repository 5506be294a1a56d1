"""The optimizer of what quantizers learn: scales, and the bases of exponential levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["ScaleOptimizer"]


class ScaleOptimizer:
    """Adam on the logarithms of scales, apart from the optimizers of the weights.

    Adam, because the size of a scale's gradient grows with the number of values that share the scale: only its
    direction is of use. Logarithms, because no step can then take a scale below 0, and a step is a factor, whatever the
    scale's size. The learning rate decays to 0 over the phase.

    Args:
        learning_rate: Largest change of a logarithm per step, about: 1e-3 is 0.1 % of the scale.

    Example:
        >>> log = nn.Parameter(torch.zeros(3))
        >>> learning = ScaleOptimizer(0.1)
        >>> learning.follow({"layer:scale": log})
        >>> log.sum().backward()
        >>> learning.step()
        >>> log.detach()
        tensor([-0.1000, -0.1000, -0.1000])
    """

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.optimizer: torch.optim.Adam | None = None
        # of a checkpoint, until the parameters that it belongs to are there
        self._pending: dict[str, Any] | None = None

    @property
    def _learned(self) -> list[nn.Parameter]:
        return [] if self.optimizer is None else self.optimizer.param_groups[0]["params"]

    def follow(self, logarithms: Mapping[str, nn.Parameter]) -> None:
        """Optimize these parameters from now on; moments of those that were known already are kept."""
        learned = list(logarithms.values())
        same = [id(p) for p in self._learned] == [id(p) for p in learned]
        if same and self._pending is None:
            return
        before = {} if self.optimizer is None else self.optimizer.state
        if not learned:
            self.optimizer = None
            return
        self.optimizer = torch.optim.Adam(learned, self.learning_rate)
        # gradients may be left from steps that nobody took
        self.optimizer.zero_grad()
        self.optimizer.state.update({p: before[p] for p in learned if p in before})
        if self._pending is not None:
            self.optimizer.load_state_dict(self._pending)
            self._pending = None

    def forget_reshaped(self) -> None:
        """Drop the moments of parameters whose channels were removed: they begin anew."""
        if self.optimizer is None:
            return
        moments = self.optimizer.state
        for p in [p for p, known in moments.items() if known["exp_avg"].shape != p.shape]:
            del moments[p]

    def decay(self, progress: float) -> None:
        """Set the learning rate for a share of the phase: linear, 0 from its end on."""
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["lr"] = self.learning_rate * max(1 - progress, 0)

    def step(self, num_processes: int = 1) -> None:
        """Learn from the gradients of the user's own step.

        Args:
            num_processes: Processes to average the gradients over; the wrapper of DDP does not know these parameters.
        """
        if self.optimizer is None:
            return
        if num_processes > 1:
            self._average(num_processes)
        for p in self._learned:
            # a loss scaler skips the user's step when gradients overflow, and so do we
            if p.grad is not None and not torch.isfinite(p.grad).all():
                p.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _average(self, num_processes: int) -> None:
        """Average the gradients over the processes, in one exchange; a missing one counts as 0."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._learned]
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        parts = flat.split([p.numel() for p in self._learned])
        for p, part in zip(self._learned, parts, strict=True):
            p.grad = part.view_as(p) / num_processes

    def state_dict(self) -> dict[str, Any] | None:
        """Moments and learning rate; None where nothing is learned."""
        return self._pending if self.optimizer is None else self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore from a checkpoint, once :meth:`follow` names the parameters."""
        self.optimizer = None
        self._pending = state
