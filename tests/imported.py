"""What the commands of the tests import, so that it is imported once: see ``processes``.

Not wandb: its folder for pictures is made at import, and the first process that ends would remove it for all.
"""

import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import torch.onnx._internal.exporter._core  # noqa: F401
