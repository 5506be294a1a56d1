"""The runs below a folder: what each ships, what it was asked, and those that left no report."""

from __future__ import annotations

import json
import re
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.analysis.report import describe_missed
from lightning_compress.checks import check_path, first_line, is_number, shown
from lightning_compress.files import write_whole

__all__ = ["COSTS", "Run", "differing", "failed_jobs", "jobs_without_report", "note_failure", "read_runs"]

COSTS = {"bytes": "bytes", "bytes_zstd": "bytes as zstd", "latency_ms": "ms at batch 1", "macs": "MACs"}
_NOTE = "failed.txt"


@dataclass(frozen=True)
class Run:
    """What a run's report says of what it ships.

    Args:
        name: Its folder, below that of all runs.
        metric: Of the first exported file, or of the compressed model where there is no file.
        bytes: Of that file.
        bytes_zstd: Of that file, compressed.
        latency_ms: Of that file, one sample.
        macs: Multiply-accumulates.
        sparsity: Share of zero weights.
        command: What makes the run again.
        missed: What it was asked for and did not reach, in sentences.
        deployed_minus_trained: The metric of the file less that of the trained model in PyTorch.
        latency_ms_quartiles: Of the repetitions of that; None where they are not known.
        runtime: Where the milliseconds were taken.
        overrides: What was asked of the run, by field.
        report: Its page, by the path from the folder of all runs; empty without one.
        samples: Validation samples that the metric was measured over; None where that is not known.
    """

    name: str
    metric: float
    bytes: int | None
    bytes_zstd: int | None
    latency_ms: float | None
    macs: int | None
    sparsity: float | None
    command: str
    missed: tuple[str, ...] = ()
    deployed_minus_trained: float | None = None
    latency_ms_quartiles: tuple[float, float] | None = None
    runtime: str = ""
    overrides: dict[str, str] = field(default_factory=dict, hash=False)
    report: str = ""
    samples: int | None = None


def read_runs(
    folder: str | Path, monitor: str | None = None, left_out: dict[str, str] | None = None
) -> tuple[str, list[Run]]:
    """The metric's name, and every run that left a report.json anywhere below a folder.

    Args:
        folder: The folder.
        monitor: Only runs that report this metric; all without one.
        left_out: Is told of the runs that are left out, by name, and why.

    Raises:
        ValueError: If there is none, or they report different metrics.
    """
    check_path("pareto.runs", folder, "the folder of the runs")
    folder = Path(folder)
    found = []
    metrics = set()
    reasons = {} if left_out is None else left_out
    for path in sorted(folder.rglob("report.json")):
        name = str(path.parent.relative_to(folder))
        try:
            metric, run = _read_run(path, name)
        except Exception as error:  # a report that is cut, or another tool's: it costs this run, and not the table
            reasons[name] = f"what it left cannot be read ({first_line(error)})"
            continue
        if run is None:
            reasons[name] = "its report.json has no metric"
            continue
        metrics.add(metric)
        if monitor in (None, metric):
            found.append(run)
        else:
            reasons[name] = f"its report is of {metric!r}"
    if metrics and not found:
        raise ValueError(
            f"pareto.monitor={monitor!r}: no report is of it. Accepted is what the reports are of: "
            f"{', '.join(sorted(map(str, metrics)))}."
        )
    if not found:
        said = "".join(f" {name}: {reason}." for name, reason in reasons.items())
        raise ValueError(
            f"runs={str(folder)!r}: no report.json with a metric is below it. Give a sweep's folder.{said}"
        )
    if monitor is not None:
        return monitor, found
    if len(metrics) > 1:
        raise ValueError(
            f"runs={str(folder)!r}: the reports are of different metrics, {', '.join(sorted(map(str, metrics)))}. Give "
            "a folder whose runs report the same one, or pareto.monitor."
        )
    return metrics.pop(), found


def _read_run(path: Path, name: str) -> tuple[str, Run | None]:
    """The metric's name, and the run; None where it has no value."""
    report = json.loads(path.read_text())
    first = next(iter(report["artifacts"]), None)
    totals = report["compressed"] or {}
    metric = totals.get("metric") if first is None or first["metric"] is None else first["metric"]
    if metric is None:
        return "", None
    source = totals if first is None else first
    timed, key = (report, "latency_ms_pytorch") if first is None else (first, "latency_ms")
    quartiles = timed.get(f"{key}_quartiles", {}).get("1")
    page = path.with_name("report.html")
    asked, command = _asked(path.parent)
    run = Run(
        name,
        metric,
        source.get("bytes"),
        source.get("bytes_zstd"),
        timed[key].get("1"),
        totals.get("macs"),
        totals.get("sparsity"),
        command,
        tuple(describe_missed(row) for row in report.get("targets", []) if row["missed"]),
        None if first is None else first.get("deployed_minus_trained"),
        None if quartiles is None else (quartiles[0], quartiles[1]),
        "PyTorch" if first is None else str(first.get("runtime", "")),
        asked,
        str(Path(name, page.name)) if page.is_file() else "",
        report.get("validation_samples"),
    )
    _check(run)
    if not isinstance(report["metric"], str):
        raise ValueError(f"the name of the metric is {shown(report['metric'])}")
    return report["metric"], run


def _check(run: Run) -> None:
    numbers: dict[str, Any] = {name: getattr(run, name) for name in ("metric", *COSTS, "sparsity", "samples")}
    for i, value in enumerate(run.latency_ms_quartiles or ()):
        numbers[f"latency_ms_quartiles[{i}]"] = value
    for name, value in numbers.items():
        if value is not None and (not is_number(value) or (name != "metric" and value < 0)):
            raise ValueError(f"{name} is {shown(value)}")


def _asked(folder: Path) -> tuple[dict[str, str], str]:
    """What a run was asked by field, and its command, from the overrides that Hydra wrote down; none where it did not.

    A field that was taken out (``~compression.export``) is there without a value.
    """
    from omegaconf import OmegaConf

    path = folder / ".hydra" / "hydra.yaml"
    if not path.is_file():
        return {}, ""
    given = OmegaConf.to_container(OmegaConf.load(path).hydra.overrides)
    assert isinstance(given, dict)
    places = [override for override in given["hydra"] if override.startswith("hydra.searchpath")]
    words = (override.partition("=") for override in given["task"])
    asked = {name.lstrip("+~"): value if equals else "left out" for name, equals, value in words}
    return asked, shlex.join(["lightning-compress", *given["task"], *places])


def differing(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """What differs between runs: short names of the fields, and for each run their values; "-" where none was given.

    Example:
        >>> given = [{"a.sparsity": "0.5", "seed": "0"}, {"a.sparsity": "0.9", "seed": "0"}]
        >>> runs = [Run("", 0.9, 1, 1, 1.0, 1, 0.0, "", overrides=asked) for asked in given]
        >>> differing(runs)
        (['sparsity'], [['0.5'], ['0.9']])
    """
    known = dict.fromkeys(name for run in runs for name in run.overrides if name != "dir")
    fields = [name for name in known if len({run.overrides.get(name) for run in runs}) > 1]
    short = [re.sub(r"^.*\.(?=\w+$)", "", name) for name in fields]
    names = [name if short.count(last) > 1 else last for name, last in zip(fields, short, strict=True)]
    return names, [[run.overrides.get(name, "-") for name in fields] for run in runs]


def jobs_without_report(folder: Path) -> dict[str, str]:
    """The jobs of a sweep that left no report, by name, and why, as far as that is known."""
    failed = failed_jobs(folder)
    jobs = sorted(path.parent for path in folder.rglob(".hydra") if path.parent != folder)
    without = [job for job in jobs if next(job.rglob("report.json"), None) is None]
    unknown = "it left no report: it has no CompressionReport, was ended early, or was killed"
    return {str(job.relative_to(folder)): failed.get(str(job.relative_to(folder)), unknown) for job in without}


def failed_jobs(folder: Path, since: float = 0.0) -> dict[str, str]:
    """The jobs of a sweep that failed, by name, and why; without notes from before ``since``, a ``time.time()``."""
    notes = [path for path in sorted(folder.rglob(_NOTE)) if (path.parent / ".hydra").is_dir()]
    return {str(path.parent.relative_to(folder)): _why(path) for path in notes if path.stat().st_mtime >= since}


def _why(note: Path) -> str:
    return f"it failed: {note.read_text(errors='replace').partition(chr(10))[0]}"


def note_failure(job: Path, error: BaseException | None) -> Path:
    """Write down why a job failed, for the table of its sweep; None takes away what an earlier try has left."""
    path = job / _NOTE
    if error is None:
        path.unlink(missing_ok=True)
    else:
        write_whole(path, "".join([first_line(error), "\n\n", *traceback.format_exception(error)]))
    return path
