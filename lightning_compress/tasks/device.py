"""Whether a search can be held on the runtime that it measures in, said before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig

from lightning_compress.tasks.compose import start
from lightning_compress.tasks.validation import validator

__all__ = ["check_budget", "rehearse"]


def check_budget(budget: Mapping[str, Any], form: str) -> None:
    """Refuse a budget that the format's runtime cannot measure here.

    Args:
        budget: What must not be exceeded, by name.
        form: The search's format.

    Raises:
        ValueError: If it is one of microcontrollers and the format is not, or milliseconds and the format is.
    """
    from lightning_compress.deploy.formats import FORMATS

    of_boards = [name for name in ("sram", "flash") if name in budget]
    board = form in FORMATS and FORMATS[form].board
    if of_boards and not board:
        raise ValueError(
            f"budget.{of_boards[0]}={budget[of_boards[0]]} is proven by the interpreter of microcontrollers, and "
            f"search.format={form!r} is none. Give search.format=tflm, or budget.bytes for the file alone."
        )
    if "latency_ms" in budget and board:
        raise ValueError(
            f"budget.latency_ms={budget['latency_ms']}: milliseconds of {form!r} here say nothing of a board. Give "
            "budget.macs, which they follow, or another search.format."
        )


def rehearse(cfg: DictConfig) -> None:
    """Write the model as it starts in the search's format, and run the file.

    Raises:
        ValueError: If the format's converter or runtime does not take the model, in its words.
    """
    from lightning_compress.deploy.files import try_format
    from lightning_compress.deploy.formats import FORMATS, check_formats
    from lightning_compress.forward import record_inputs
    from lightning_compress.quantization.convert import float_twin

    name = cfg.search.format
    check_formats([name])
    _, model, data = start(cfg, [], False)
    model = model.cpu().eval()
    validate = validator(cfg, data)
    inputs = record_inputs(model, lambda: validate(model))
    if inputs is None:
        return  # which the search says
    with TemporaryDirectory() as folder:
        try:
            try_format(FORMATS[name], float_twin(model), inputs, Path(folder))
        except Exception as error:  # whatever a converter raises
            raise ValueError(
                f"search.format={name!r} cannot take {type(model).__name__}: {error}. Change that part of the model, "
                "or give another search.format."
            ) from error
