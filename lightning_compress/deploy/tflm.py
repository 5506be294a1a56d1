"""TensorFlow Lite Micro: the .tflite file of one sample, run by the interpreter of microcontrollers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np

from lightning_compress.deploy import litert
from lightning_compress.deploy.runner import pieces_of
from lightning_compress.forward import Inputs

__all__ = ["CodeDifference", "Runner", "compare_operations", "export"]

export = litert.export  # one file for phones and boards
_SPARE = 1 << 20  # bytes that the interpreter needs beside activations


class CodeDifference(NamedTuple):
    """How the integer codes of two interpreters differ on the same codes as input.

    Args:
        num: Output codes that were compared.
        differing: How many of them differ.
        largest: By how many steps at most.
    """

    num: int = 0
    differing: int = 0
    largest: int = 0

    def __add__(self, other: tuple[Any, ...]) -> CodeDifference:
        num, differing, largest = other
        return CodeDifference(self.num + num, self.differing + differing, max(self.largest, largest))


class Runner(litert.Runner):
    """Runs a .tflite file in the interpreter of the package ``tflite-micro`` (David 2020, arXiv:2010.08678).

    Its kernels are the portable ones of C++, so a millisecond here says nothing of a board, and a board's own kernels
    (CMSIS-NN, ESP-NN) are to give the same codes. LiteRT lies beside it: it reads what the file says of its inputs and
    outputs, and its codes are compared.

    Args:
        path: The file, of batch size 1 for a board.
        example_outputs: Outputs of the model, whose structure the runner gives back.
        preserve: Keep every value until the next call; the arena is unknown then.

    Raises:
        RuntimeError: If the interpreter lacks an operator of the file or cannot prepare it; it is named.
    """

    runtime = "tflm"

    def __init__(self, path: Path, example_outputs: Any, preserve: bool = False) -> None:
        super().__init__(path, example_outputs)
        self.path = path
        sizes = [int(np.prod(d["shape"])) for d in self.interpreter.get_tensor_details()]
        # a convolution may keep a 32-bit copy of each of its outputs
        self.micro = _interpreter(path.read_bytes(), 8 * sum(sizes) + _SPARE, preserve)
        self._inputs = _places(self.interpreter.get_input_details(), self.inputs)
        self._outputs = _places(self.interpreter.get_output_details(), self.outputs)

    def run_codes(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs as the file gives them, for one batch as it takes it."""
        for place, values in zip(self._inputs, codes, strict=True):
            self.micro.set_input(values, place)
        self.micro.invoke()
        return [self.micro.get_output(place).copy() for place in self._outputs]

    def prepare(self, inputs: Inputs) -> Callable[[], Any]:
        """A call without arguments that runs the file once."""
        codes = self.codes_of(next(pieces_of(inputs, self.batch_size)))
        return lambda: self.run_codes(codes)

    def value(self, index: int) -> np.ndarray:
        """What a value of the file was in the last call, of a runner that preserves them."""
        return self.micro.GetTensor(index, 0)["tensor_data"]

    @property
    def arena_bytes(self) -> int:
        """RAM that the interpreter takes for activations and its own records, with the 64-bit pointers of this machine.

        The records are smaller on a board, whose pointers have 32 bits.
        """
        self.run_codes([np.zeros(d["shape"], d["dtype"]) for d in self.inputs])
        with _stderr() as said:
            self.micro.print_allocations()
        found = re.search(r"Arena allocation total (\d+) bytes", said())
        if found is None:
            raise RuntimeError(f"tflite-micro does not say the size of its arena; it said {said()!r}.")
        return int(found[1])

    def compare(self, inputs: Inputs, reference: bool = False) -> CodeDifference:
        """Codes of this interpreter against those of LiteRT on the same input codes.

        Args:
            inputs: Any number of samples.
            reference: Against LiteRT's reference kernels instead of XNNPACK's.
        """
        other = litert.Runner(self.path, None, reference)
        found = CodeDifference()
        for piece in pieces_of(inputs, self.batch_size):
            codes = self.codes_of(piece)
            for here, there in zip(self.run_codes(codes), other.run_codes(codes), strict=True):
                found += _difference(here, there)
        return found


def compare_operations(path: Path, inputs: Inputs) -> dict[str, CodeDifference]:
    """Codes of each operation against those of LiteRT's reference kernels, where both were given the same codes.

    Args:
        path: The .tflite file.
        inputs: Some samples.

    Returns:
        By the operation's name, summed over all operations of it.
    """
    micro, other = Runner(path, None, preserve=True), litert.Runner(path, None, reference=True, preserve=True)
    found: dict[str, CodeDifference] = {}
    for piece in pieces_of(inputs, micro.batch_size):
        codes = micro.codes_of(piece)
        micro.run_codes(codes)
        other.run_codes(codes)
        differing: set[int] = set()
        # the interpreter shows its operations nowhere else
        for op in other.interpreter._get_ops_details():  # noqa: SLF001
            alike = differing.isdisjoint(int(i) for i in op["inputs"])
            for i in map(int, op["outputs"]):
                one = _difference(micro.value(i), other.interpreter.get_tensor(i))
                if one.differing:
                    differing.add(i)
                if alike:
                    found[op["op_name"]] = found.get(op["op_name"], CodeDifference()) + one
    return found


def _difference(here: np.ndarray, there: np.ndarray) -> CodeDifference:
    """Of integers; values that are none are not compared."""
    if not np.issubdtype(there.dtype, np.integer):
        return CodeDifference()
    steps = np.abs(here.astype(np.int64).ravel() - there.ravel())
    return CodeDifference(steps.size, int((steps > 0).sum()), int(steps.max(initial=0)))


def _places(details: Sequence[Any], wanted: Sequence[Any]) -> list[int]:
    """Where those that are wanted stand in the file's own list."""
    order = [d["index"] for d in details]
    return [order.index(d["index"]) for d in wanted]


def _interpreter(data: bytes, arena: int, preserve: bool) -> Any:
    from tflite_micro.python.tflite_micro.runtime import Interpreter, InterpreterConfig

    kind = InterpreterConfig.kPreserveAllTensors if preserve else InterpreterConfig.kAllocationRecording
    with _stderr() as said:
        try:
            return Interpreter.from_bytes(data, arena_size=arena, intrepreter_config=kind)
        except RuntimeError as error:
            reason = str(error)
    lacking = re.findall(r"find op for builtin opcode '(\w+)'", said())
    if lacking:
        reason = f"TensorFlow Lite Micro has no kernel for the operator {lacking[0]} of the .tflite file"
    else:
        reason = "; ".join([reason, *filter(str.strip, said().splitlines())])
    raise RuntimeError(reason)


@contextmanager
def _stderr() -> Iterator[Callable[[], str]]:
    """What C++ says, which has no other way to say it."""
    kept = os.dup(2)
    with TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        text = ""
        try:
            yield lambda: text
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")
