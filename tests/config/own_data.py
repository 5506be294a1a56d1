"""A user's own data."""

from torch.utils.data import TensorDataset

from ..zoo import MLP


def dataset() -> TensorDataset:
    """Eight batches."""
    return TensorDataset(*(t.repeat(8, *[1] * (t.dim() - 1)) for t in MLP().tensors()))
