"""The callbacks in other people's training: applications, command lines, and models of many packages.

torchmetrics, timm and others import torchvision wherever it is installed, and its wheel does not load beside a torch of
another build, such as that for CPUs alone. The models here never call its operators: their names are enough.
"""

from importlib.util import find_spec

__all__: list[str] = []

if find_spec("torchvision"):
    import torch

    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
