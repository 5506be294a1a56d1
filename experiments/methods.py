"""Every method of the benchmark: ours, the peers' and the controls, at which points, and where its code is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ABSENT", "METHODS", "Method"]

Kind = Literal["zeros", "macs", "bits", "sparse8", "dense"]


@dataclass(frozen=True)
class Method:
    """One way to reach a point.

    Args:
        kind: What it reaches: a share of zeros, times fewer multiplications, bits of a weight, or a share of zeros in 8
            bits.
        train: ``module:function`` of the trained model, the budget and the amount; gives the model that ships.
        role: Ours, a peer's, or a control's.
        amounts: The amounts that it takes; any where there are none.
        package: Distribution whose version is told beside the result.
        environment: Name of the requirements in ``experiments/peers``, for one that cannot live with the others.
        tuned: Whether it has a learning rate.
        write: ``module:function`` of the model, an example batch and a folder; gives the path of the file that ships.
    """

    kind: Kind
    train: str
    role: Literal["ours", "peer", "control"] = "peer"
    amounts: tuple[float, ...] = ()
    package: str = "torch"
    environment: str = ""
    tuned: bool = True
    write: str = "experiments.shipping:write_onnx"


_PLAIN, _OURS = "experiments.peers.plain", "experiments.recipes"
_ORT = "experiments.peers.ort_static"


def _trained(module: str, package: str, *bits: int) -> Method:
    """One of the tools that train in quantized values, which live in an environment of their own."""
    address = f"experiments.peers.{module}"
    return Method("bits", f"{address}:train_quantized", "peer", bits, package, "peers", write=f"{address}:write")


METHODS: dict[tuple[str, str], Method] = {
    # ours: one recipe a kind, for all tasks and amounts
    ("ours", "zeros"): Method("zeros", f"{_OURS}:pruned", "ours", package="lightning-compress"),
    ("ours", "macs"): Method("macs", f"{_OURS}:narrowed", "ours", package="lightning-compress"),
    ("ours", "bits"): Method(
        "bits", f"{_OURS}:with_bits", "ours", package="lightning-compress", write=f"{_OURS}:write_quantized"
    ),
    ("ours", "sparse8"): Method(
        "sparse8", f"{_OURS}:sparse_with_8_bits", "ours", package="lightning-compress", write=f"{_OURS}:write_quantized"
    ),
    # controls
    ("random", "zeros"): Method("zeros", f"{_PLAIN}:random_pruning", "control"),
    ("random", "macs"): Method(
        "macs", "experiments.peers.torch_pruning:random_channels", "control", package="torch-pruning"
    ),
    ("global magnitude and a teacher", "zeros"): Method("zeros", f"{_PLAIN}:taught_magnitude", "control"),
    ("small dense", "zeros"): Method("zeros", "experiments.peers.small:as_many_weights", "control"),
    ("small dense", "macs"): Method("macs", "experiments.peers.small:as_many_macs", "control"),
    ("small dense", "bits"): Method("bits", "experiments.peers.small:as_many_bytes", "control", amounts=(4, 3, 2)),
    ("dense trained on", "dense"): Method("dense", "experiments.training:dense", "control"),
    # peers
    ("global magnitude by hand", "zeros"): Method("zeros", f"{_PLAIN}:global_magnitude"),
    ("torch.nn.utils.prune", "zeros"): Method("zeros", "experiments.peers.torch_prune:one_shot"),
    ("Lightning ModelPruning", "zeros"): Method(
        "zeros", "experiments.peers.lightning_pruning:model_pruning", package="lightning"
    ),
    ("Torch-Pruning GroupNorm", "macs"): Method(
        "macs", "experiments.peers.torch_pruning:group_norm", package="torch-pruning"
    ),
    ("Torch-Pruning GroupTaylor", "macs"): Method(
        "macs", "experiments.peers.torch_pruning:group_taylor", package="torch-pruning"
    ),
    ("torch-kirigami", "macs"): Method(
        "macs", "experiments.peers.kirigami:group_magnitude", package="torch-kirigami", environment="pruners"
    ),
    ("Core AI", "zeros"): Method(
        "zeros", "experiments.peers.core_ai:magnitude", package="coreai-opt", environment="pruners"
    ),
    ("fasterai", "zeros"): Method(
        "zeros", "experiments.peers.fasterai_sparsify:magnitude", package="fasterai", environment="pruners"
    ),
    ("NNCF", "zeros"): Method(
        "zeros", "experiments.peers.nncf_pruning:magnitude", package="nncf", environment="pruners"
    ),
    ("ModelOpt FastNAS", "macs"): Method(
        "macs", "experiments.peers.fastnas:searched", package="nvidia-modelopt", environment="pruners"
    ),
    ("TWN by hand", "bits"): Method("bits", f"{_PLAIN}:naive_ternary", amounts=(2,)),
    ("onnxruntime static", "bits"): Method(
        "bits", f"{_ORT}:as_it_is", amounts=(8,), package="onnxruntime", tuned=False, write=f"{_ORT}:write"
    ),
    ("torchao PT2E QAT", "bits"): _trained("torchao_pt2e", "torchao", 8),
    ("Brevitas", "bits"): _trained("brevitas_qat", "brevitas", 8, 4, 3, 2),
    ("NNCF", "bits"): _trained("nncf_qat", "nncf", 8),
    ("ModelOpt", "bits"): _trained("modelopt_qat", "nvidia-modelopt", 8, 4),
    ("AIMET", "bits"): _trained("aimet_qat", "aimet-torch", 8, 4),
    ("torchao PARQ", "bits"): Method(
        "bits", "experiments.peers.parq:train_quantized", "peer", (4, 3, 2), "torchao", "peers"
    ),
    ("magnitude + onnxruntime static", "sparse8"): Method(
        "sparse8", f"{_ORT}:pruned", package="onnxruntime", write=f"{_ORT}:write"
    ),
}

# what does not install or does not run, with the reason
ABSENT: dict[str, str] = {
    "Lightning ModelPruning, ResNet-20": "not run yet with several epochs; pruned after the only one it had 10 %",
    "torch-kirigami and ModelOpt FastNAS, ResNet-20": "no plan for 8x fewer multiplications; the search reaches 5.6x",
    "torch-kirigami, emoji": "to be run anew: on one of the cuts its share of channels was too small for 8x",
    "fasterai and NNCF's pruning, fsdd, MNIST-1D and ResNet-20": "not run yet: judged on emoji",
    "AIMET, fsdd and MNIST-1D in 8 bits": "not run yet with rates and a file that suit it",
    "NNCF, ModelOpt, AIMET, PT2E, ResNet-20 in bits": "not run yet, nor Brevitas and PARQ in 8 and 4 bits",
    "Neural Compressor, pruning": "the wheel of 3.10 holds no pruning",
    "ModelOpt GradNAS": "0.47 prunes by FastNAS and, for Megatron's models, by Minitron alone",
    "torchao QATConfig": "swaps nn.Linear and nn.Embedding alone (0.18): nearly all weights here are in convolutions",
    "Neural Compressor": "its training (3.10, prepare_qat) swaps nn.Linear alone; int8 is post-training there",
    "coreai-opt": "its quantized files (0.4) are for Apple's systems alone; what it gives torch has float weights",
    "luxonis-train": "wants torch < 2.13 (0.6), and its callback quantizes its own LuxonisLightningModule by AIMET",
}
