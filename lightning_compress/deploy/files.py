"""The files of one model in one format: the file that ships and its float twin, and how they run beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lightning_compress.deploy.formats import Format
from lightning_compress.deploy.in_float import said_of_some
from lightning_compress.deploy.runner import Kernels
from lightning_compress.deploy.timing import Timed, time_together
from lightning_compress.deploy.verify import Artifact
from lightning_compress.forward import Inputs, check_batch_axis, run_model, with_batch
from lightning_compress.quantization.convert import float_twin, overflowing
from lightning_compress.quantization.model import check_whole, quantization_of

__all__ = ["Files", "is_quantized", "try_format", "words_of_caution", "words_of_doubt", "write_files"]


class Files(NamedTuple):
    """Paths by batch size; one path for all where a file takes any batch.

    Args:
        shipped: The files of the model.
        twin: Their float twins.
        overflowing: Layers that only a CPU with VNNI multiplies exactly in this format's runtime.
    """

    shipped: dict[int, Path]
    twin: dict[int, Path]
    overflowing: list[str]


def is_quantized(model: nn.Module) -> bool:
    """Whether a model computes with fake-quantized values."""
    quantization = quantization_of(model)
    return quantization is not None and quantization.enabled


def write_files(
    kind: Format,
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    sizes: Sequence[int] = (1, 64),
    metadata: Mapping[str, str] | None = None,
) -> Files:
    """Write a model, with the integers that the runtime takes if it is quantized, and its float twin.

    Args:
        kind: The format.
        model: In eval mode on the CPU.
        inputs: Example inputs.
        path: The file for any batch, or for the first size: those of the others are named by their size.
        sizes: Batch sizes.
        metadata: What the files say of themselves, where the format has a place for that.

    Raises:
        Exception: Whatever the converter says of a model that it does not take.
    """
    check_whole(model)
    plain = float_twin(model)
    check_batch_axis(plain, inputs)
    shipped = kind.convert(model) if is_quantized(model) else plain
    exact = kind.activations == "int8"  # XNNPACK adds in 32 bits on every CPU
    files = Files({}, {}, [] if exact or shipped is plain else overflowing(shipped, kind.integer_lstm))
    for size in sizes:
        if kind.dynamic_batch and files.shipped:
            files.shipped[size] = files.shipped[sizes[0]]
            files.twin[size] = files.twin[sizes[0]]
            continue
        ending = "" if size == sizes[0] else f"_batch{size}"
        options: dict[str, Any] = {} if kind.dynamic_batch else {"batch_size": size}
        if kind.has_metadata:
            options["metadata"] = metadata
        for module, paths, middle in ((plain, files.twin, "_float"), (shipped, files.shipped, "")):
            paths[size] = path.with_name(f"{path.stem}{middle}{ending}{kind.suffix}")
            kind.export(module, inputs, paths[size], **options)
    return files


def try_format(kind: Format, model: nn.Module, inputs: Inputs, folder: Path) -> None:
    """Write a model that computes in float, and run the file on one example; nothing is kept of it.

    Raises:
        Exception: Whatever the converter or the runtime says of a model that it does not take.
    """
    kind.check(model)
    check_batch_axis(model, inputs)
    one = with_batch(inputs, 1)
    path = folder / f"rehearsal{kind.suffix}"
    kind.export(model, inputs, path, **({} if kind.dynamic_batch else {"batch_size": 1}))
    kind.runner(path, run_model(model, one))(one)


class Pair:
    """A file and its float twin in their runtime.

    Args:
        kind: The format.
        files: Their paths.
        model: The PyTorch model, for the structure of its outputs.
        inputs: Example inputs.
    """

    def __init__(self, kind: Format, files: Files, model: nn.Module, inputs: Inputs) -> None:
        self.kind = kind
        self.inputs = inputs
        outputs = run_model(model, with_batch(inputs, 1))
        made: dict[Path, Any] = {}
        self.runners: dict[int, tuple[Any, Any]] = {}
        for size in files.shipped:
            pair = files.shipped[size], files.twin[size]
            for path in pair:
                if path not in made:
                    made[path] = kind.runner(path, outputs)
            self.runners[size] = made[pair[0]], made[pair[1]]

    @property
    def shipped(self) -> Any:
        """The runner of the file that ships, of the first batch size where it has one."""
        return next(iter(self.runners.values()))[0]

    def latency(self, seconds: float = 1.0) -> tuple[dict[str, Timed], dict[str, Timed]]:
        """Milliseconds by batch size of the file and of its twin, interleaved, one thread.

        Without any where they say nothing of the device that the file is for.
        """
        taken: tuple[dict[str, Timed], dict[str, Timed]] = ({}, {})
        for size, pair in self.runners.items() if not self.kind.board else ():
            calls = [runner.prepare(with_batch(self.inputs, size)) for runner in pair]
            for times, timed in zip(taken, time_together(calls, seconds), strict=True):
                times[str(size)] = timed
        return taken

    def integer_kernels(self) -> Kernels:
        """How the file's operations run."""
        return self.shipped.integer_kernels()

    def float_kernels(self) -> list[tuple[str, str]]:
        """Modules and types of those that run in float, where the runtime tells them."""
        found: list[tuple[str, str]] = getattr(self.shipped, "float_kernels", list)()
        return found

    @property
    def arena_bytes(self) -> int | None:
        """RAM that the runtime takes for the file, where it is one that has to be given it."""
        return getattr(self.shipped, "arena_bytes", None)


def words_of_doubt(artifact: Artifact, min_agreement: float, max_difference: float) -> list[str]:
    """Where the file does not answer like the model, or would not on another CPU, in words.

    Args:
        artifact: The file and its proof.
        min_agreement: Least share of samples with the model's answer.
        max_difference: Largest difference of an output, as a share of the output's range.
    """
    file = f"{Path(artifact.path).name} in {artifact.runtime}"
    said = []
    agreement = artifact.agreement
    difference = artifact.max_rel_diff
    if agreement is not None and not agreement >= min_agreement:
        said.append(f"{file} gives the model's answer on {agreement:.2%} of the samples; {min_agreement:.2%} is asked.")
    if difference is not None and not difference <= max_difference:  # NaN too
        said.append(
            f"{file} differs from the model by {difference:.2%} of its output's range; {max_difference:.2%} is allowed."
        )
    if artifact.overflowing:
        num = len(artifact.overflowing)
        first = ", ".join(artifact.overflowing[:3])
        said.append(
            f"{file} is exact only on CPUs that add products in 32 bits (on x86: with VNNI). Elsewhere {num} of its "
            f"layers ({first}{', ...' if num > 3 else ''}) can saturate, for two of their weights and activations do "
            f"not fit into 16 bits together. It was run on {artifact.cpu}. To ship to any x86 CPU train without "
            "exact_kernels=True, or take ExecuTorch or LiteRT."
        )
    return said


def words_of_caution(artifact: Artifact) -> list[str]:
    """Where a quantized file is no smaller, or is slower in three of four turns, than its float twin, in words."""
    file = f"{Path(artifact.path).name} in {artifact.runtime}"
    said = []
    if artifact.bytes_zstd >= (artifact.bytes_zstd_float or artifact.bytes_zstd + 1):
        said.append(
            f"{file} is not smaller than its float twin: {artifact.bytes_zstd:,} bytes against "
            f"{artifact.bytes_zstd_float:,} as zstd."
        )
    for size, ms in artifact.latency_ms.items():
        before = artifact.latency_ms_float[size]
        if artifact.times_faster.get(size, [1.0, 1.0, 1.0])[2] < 1:
            said.append(
                f"{file} is slower than its float twin at batch {size}: {ms:.3g} ms against {before:.3g} "
                f"({artifact.cpu})."
            )
    integer = artifact.integer_kernels or 0
    total = artifact.num_kernels or 0
    if integer < total:
        which = f" In float: {said_of_some(artifact.float_kernels)}." if artifact.float_kernels else ""
        said.append(f"{file} runs {total - integer} of {total} operations with stored weights in float kernels.{which}")
    return said
