"""A file for one runtime: written, run there over the user's own validation, and compared with the model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.deploy.cpu import cpu_features
from lightning_compress.deploy.files import Pair, is_quantized, words_of_caution, write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.in_float import in_float
from lightning_compress.deploy.interface import Taken, taken_by_file
from lightning_compress.deploy.size import weigh
from lightning_compress.deploy.timing import plain_times, times_faster
from lightning_compress.deploy.verify import Artifact, Comparison
from lightning_compress.forward import Inputs, input_names, replaced_forward
from lightning_compress.quantization.activation_codes import code_types

from .evaluate import copied, evaluate
from .examples import example_inputs, no_inputs
from .protocol import compressing

__all__ = ["metadata_of", "prove"]


def prove(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, path: Path, metadata: dict[str, str]
) -> tuple[Artifact, dict[str, float]]:
    """Write a file, run it, and measure all that it is judged by; also what validation logs with it.

    Args:
        trainer: The Trainer of the run.
        pl_module: Its model.
        name: Of the format.
        path: The file.
        metadata: What the file says of itself, where the format has a place for that.

    Raises:
        Exception: Whatever a converter or a runtime says.
    """
    kind = FORMATS[name]
    given = _inputs(trainer, pl_module)
    reference = copied(pl_module).cpu().eval()
    quantized = is_quantized(reference)
    taken = taken_by_file(reference, given)
    _tell_left_out(path, taken)
    files = write_files(kind, reference, taken.inputs, path, kind.batch_sizes, metadata)
    pair = Pair(kind, files, reference, taken.inputs)
    comparison = Comparison(reference, pair.shipped, given, taken)
    artifact = Artifact(name, pair.shipped.runtime, str(path), *weigh(path))
    measured = copied(pl_module)
    with replaced_forward(measured, comparison):
        metrics = evaluate(trainer, measured)
    if not comparison.num_calls:
        comparison(*given.args, **given.kwargs)
        metrics = {}
    artifact.max_abs_diff = comparison.max_abs_diff
    artifact.agreement = comparison.agreement
    artifact.max_rel_diff = comparison.max_rel_diff
    artifact.overflowing = files.overflowing
    artifact.cpu = cpu_features()
    timed, timed_float = pair.latency()
    artifact.latency_ms, artifact.latency_ms_quartiles = plain_times(timed)
    artifact.latency_ms_float, artifact.latency_ms_float_quartiles = plain_times(timed_float)
    artifact.times_faster = {size: times_faster(timed[size], timed_float[size]) for size in timed}
    artifact.bytes_zstd_float = weigh(files.twin[kind.batch_sizes[0]])[1]
    artifact.integer_kernels, artifact.num_kernels = pair.integer_kernels()
    artifact.arena_bytes = pair.arena_bytes
    artifact.batch = "dynamic" if kind.dynamic_batch else str(kind.batch_sizes[0])
    artifact.integers = code_types(reference, kind.activations) if quantized else None
    artifact.inputs = input_names(reference, taken.inputs)
    artifact.left_out = [*taken.labels, *taken.lost]
    if quantized and artifact.integer_kernels < artifact.num_kernels:
        artifact.float_kernels = in_float(reference, artifact.runtime, pair.float_kernels())
    artifact.warnings = words_of_caution(artifact) if quantized else []
    if comparison.num_others:
        artifact.warnings.append(
            f"{path.name} was not asked in {comparison.num_others} calls of validation, which the model answered: "
            "their arguments differ from those that it was made of in more than the axes that it leaves open."
        )
    return artifact, metrics


def _inputs(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Inputs:
    inputs = example_inputs(trainer, pl_module)
    if inputs is None:
        raise RuntimeError(no_inputs(pl_module))
    return inputs


def _tell_left_out(path: Path, taken: Taken) -> None:
    if taken.labels:
        rank_zero_info(
            f"{path.name} leaves out the argument {', '.join(taken.labels)}, without which the model returns the same, "
            f"and the loss made of it, {', '.join(taken.lost)}: a metric of that is not known of the file."
        )


def metadata_of(trainer: pl.Trainer, pl_module: pl.LightningModule, labels: Sequence[str] | None) -> dict[str, str]:
    """What a file says of itself: the model's class, how it was compressed, the classes' names, and our version."""
    said = {"model": type(pl_module).__name__, "lightning_compress": version("lightning-compress")}
    recipe = [
        f"{type(c).__name__}({', '.join(f'{name}={value}' for name, value in c.asked().items())})"
        for c in compressing(trainer)
    ]
    if recipe:
        said["recipe"] = "; ".join(recipe)
    if labels is not None:
        said["labels"] = "\n".join(labels)
    return said
