"""Checkpoints of linear layers in groups as compressed-tensors' ``pack-quantized`` has them, which vLLM reads.

A folder with ``model.safetensors`` and, in ``config.json``, ``quantization_config``. For each layer: ``weight_packed``,
int32 with eight codes of 4 bits (or four of 8) plus 8 (128), the first in the lowest bits; ``weight_scale``, of shape
(out, in / group); and ``weight_shape``. https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightning_compress.checks import check_instance, check_path
from lightning_compress.deploy.nbits import pack
from lightning_compress.files import write_whole
from lightning_compress.layers import Layer
from lightning_compress.quantization.fake_quant import activations, weights
from lightning_compress.quantization.grouped import GroupCodes, finds_ranges, group_codes

__all__ = ["save_pack_quantized"]


def save_pack_quantized(model: nn.Module, folder: str | Path) -> None:
    """Write a model with weights in groups for vLLM; what else it holds is written as it is.

    Args:
        model: The model, or the part of it that is to be loaded: parameters are named from there on.
        folder: Where ``model.safetensors`` goes. A ``config.json`` that stands there keeps what it says of the model.

    Raises:
        ValueError: If no linear layer has weights in groups that are quantized by now, or one is no multiple of equal
            steps.

    Example:
        >>> import tempfile
        >>> from lightning_compress import w4_groups
        >>> from lightning_compress.quantization.model import quantize_layers
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> quantize_layers(model, w4_groups(32)).enable(True)
        >>> folder = tempfile.mkdtemp()
        >>> save_pack_quantized(model, folder)
        >>> json.loads(Path(folder, "config.json").read_text())["quantization_config"]["format"]
        'pack-quantized'
    """
    check_instance("save_pack_quantized.model", model, nn.Module, "an nn.Module")
    check_path("save_pack_quantized.folder", folder, "the path of a folder")
    found = {name: module for name, module in model.named_modules() if _is_in_groups(module)}
    if not found:
        raise ValueError(
            f"save_pack_quantized.model={type(model).__name__} has no nn.Linear with quantized weights in groups: "
            "accepted is a model trained through QuantizationAwareTraining('w4_groups'). Train it, or take save_packed."
        )
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    kinds: dict[tuple[int, int, bool], list[str]] = {}
    for name, module in found.items():
        codes = group_codes(Layer(f"{name}.weight", module, "weight"))
        bits = 4 if codes.limits[1] == 7 else 8
        del state[f"{name}.weight"]
        state |= {f"{name}.{key}": value for key, value in _packed(codes, bits).items()}
        kinds.setdefault((bits, codes.group, any(map(finds_ranges, activations(module)))), []).append(name)
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in found]
    config = Path(folder, "config.json")
    known = json.loads(config.read_text()) if config.is_file() else {}
    known["quantization_config"] = _configuration(kinds, others)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder, "model.safetensors"), save(state, {"format": "pt"}))
    write_whole(config, json.dumps(known, indent=2) + "\n")


def _is_in_groups(module: nn.Module) -> bool:
    quantizer = weights(module).get("weight")
    return isinstance(module, nn.Linear) and quantizer is not None and quantizer.enabled and quantizer.group is not None


def _packed(codes: GroupCodes, bits: int) -> dict[str, Tensor]:
    """The three tensors of a layer; rows are filled up to whole int32 words."""
    rows = pack(codes.codes.cpu().numpy(), codes.group, bits).reshape(len(codes.codes), -1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
    scale = codes.scale.cpu()
    short = scale.to(torch.bfloat16)
    return {
        "weight_packed": torch.from_numpy(np.ascontiguousarray(rows)).view(torch.int32),
        "weight_scale": short if torch.equal(short.float(), scale) else scale,
        "weight_shape": torch.tensor(codes.codes.shape),
    }


def _configuration(kinds: dict[tuple[int, int, bool], list[str]], others: list[str]) -> dict[str, Any]:
    """What compressed-tensors reads: which layers hold what."""
    groups = {}
    for i, ((bits, size, by_token), names) in enumerate(kinds.items()):
        token = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": size},
            "input_activations": token if by_token else None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": others,
    }
