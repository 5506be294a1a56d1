"""What is asked of a file, and whether it is reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from lightning_compress.checks import check_number
from lightning_compress.deploy.verify import Artifact

__all__ = ["Judgement", "Limits", "judge", "worst"]

_SHARE = "a number from 0 to 1, for instance 0.99"
_RATIO = "a number above 0, for instance 1.0 for no more than the float file, or None"


class Judgement(TypedDict):
    """What was asked of a file, None if nothing; what it reaches, None if unknown; and whether that is enough.

    ``ok`` is None where nothing was asked, or nothing compared.
    """

    asked: float | None
    reached: float | None
    ok: bool | None


@dataclass(frozen=True)
class Limits:
    """What is asked of every file; None asks nothing, and the value is reported only.

    Args:
        agreement: Least share of samples with the model's answer.
        difference: Largest difference of an output, as a share of its range.
        metric_drop: How much worse the metric may be than the trained model's, in the metric's own unit.
        bytes_ratio: Bytes after zstd as a share of those of the float twin.
        latency_ratio: Milliseconds as a share of those of the float twin, at the batch size where that is largest.

    Raises:
        ValueError: If a limit is out of its range.
    """

    agreement: float | None = 0.99
    difference: float | None = 0.02
    metric_drop: float | None = None
    bytes_ratio: float | None = None
    latency_ratio: float | None = None

    def check(self, names: Mapping[str, str]) -> None:
        """Raise if a limit is out of its range.

        Args:
            names: What the user calls each limit.
        """
        for field, value in asdict(self).items():
            if value is None:
                continue
            if field in ("agreement", "difference"):
                check_number(names[field], value, _SHARE, low=0, high=1)
            elif field == "metric_drop":
                check_number(names[field], value, "a number from 0 in the metric's own unit, or None", low=0)
            else:
                check_number(names[field], value, _RATIO, above=0)

    def asked(self) -> dict[str, float]:
        """The limits that are set."""
        return {field: value for field, value in asdict(self).items() if value is not None}


def judge(artifact: Artifact, limits: Limits, drop: float | None) -> dict[str, Judgement]:
    """What the file reaches of what is asked.

    Args:
        artifact: The file and its proof.
        limits: What is asked.
        drop: How much worse its metric is than the trained model's; None where one of them is unknown.
    """
    twin = artifact.bytes_zstd_float
    latency = [ms / artifact.latency_ms_float[size] for size, ms in artifact.latency_ms.items()]
    reached = {
        "agreement": artifact.agreement,
        "difference": artifact.max_rel_diff,
        "metric_drop": drop,
        "bytes_ratio": artifact.bytes_zstd / twin if twin else None,
        "latency_ratio": max(latency, default=None),
    }
    asked = asdict(limits)
    return {
        name: Judgement(asked=asked[name], reached=value, ok=_is_ok(name, asked[name], value))
        for name, value in reached.items()
    }


def _is_ok(name: str, asked: float | None, reached: float | None) -> bool | None:
    # where no output is a float there is nothing to agree or differ
    if asked is None or (reached is None and name in ("agreement", "difference")):
        return None
    if reached is None or math.isnan(reached):
        return False
    return reached >= asked if name == "agreement" else reached <= asked


_WORDS = {
    "agreement": "gives the model's answer on {:.2%} of the samples",
    "difference": "differs from the model by {:.2%} of its output's range",
    "metric_drop": "has a metric that is worse than the trained model's by {:.4g}",
    "bytes_ratio": "has {:.2f} times the bytes of its float twin after zstd",
    "latency_ratio": "takes {:.2f} times as long as its float twin",
}


def worst(artifacts: Sequence[Artifact], name: str) -> tuple[float | None, str]:
    """The worst of what files reach, and which file that is, in words.

    Args:
        artifacts: Files that were judged, one at least.
        name: Of the limit.
    """

    def badness(artifact: Artifact) -> float:
        reached = artifact.judged[name]["reached"]
        if reached is None or math.isnan(reached):
            return math.inf
        return -reached if name == "agreement" else reached

    artifact = max(artifacts, key=badness)
    reached = artifact.judged[name]["reached"]
    file = f"{Path(artifact.path).name} in {artifact.runtime}"
    if reached is None:
        return None, f"of {file} it could not be measured"
    return reached, f"{file} {_WORDS[name].format(reached)} on {artifact.cpu}"
