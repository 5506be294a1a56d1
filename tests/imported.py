"""What the commands of the tests import, so that it is imported once: see ``processes``."""

import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import torch.onnx._internal.exporter._core  # noqa: F401
import wandb  # noqa: F401
