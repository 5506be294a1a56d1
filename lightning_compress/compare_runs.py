"""The end of a sweep: one table of its jobs, those that failed among them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_compress.refusals import own

__all__ = ["CompareRuns"]


class CompareRuns(Callback):
    """Prints the frontier of a sweep when it ends; a job that fails costs the sweep neither its other jobs nor that.

    The command still ends with an error where one has failed.
    """

    def __init__(self) -> None:
        self._began = 0.0

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: object) -> None:
        """Note why a job failed; Hydra's own sweeper, which would end the sweep without a word on it, goes on."""
        from lightning_compress.analysis.runs import note_failure

        if config.hydra.mode != RunMode.MULTIRUN:
            return
        failed = job_return.status == JobStatus.FAILED
        error = own(job_return._return_value) if failed else None  # noqa: SLF001  # to ask for it is to raise it
        note = note_failure(Path(config.hydra.runtime.output_dir), error)
        if failed and _goes_on(config):
            print(f"Job {config.hydra.job.num} of the sweep failed: {error}\nWhere: {note}", file=sys.stderr)
            job_return.status = JobStatus.COMPLETED
            job_return.return_value = None

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Remember when the sweep began: an earlier one may have left its notes in the same folder."""
        self._began = time.time()

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Print the table, and name what is not in it."""
        from lightning_compress.analysis.runs import failed_jobs, jobs_without_report
        from lightning_compress.tasks.pareto import show

        folder = Path(config.hydra.sweep.dir)
        if next(folder.rglob("report.json"), None) is None:
            for name, reason in jobs_without_report(folder).items():
                print(f"{name}: {reason}")
        else:
            try:
                show(folder, config.pareto)
            except ValueError as error:
                print(f"The runs of the sweep are not compared: {error}", file=sys.stderr)
        failed = failed_jobs(folder, self._began)
        if failed and _goes_on(config):
            print(f"Of the sweep failed: {', '.join(failed)}.", file=sys.stderr)
            sys.exit(1)


def _goes_on(config: DictConfig) -> bool:
    """Whether it is our doing that the sweep goes on: other sweepers deal with jobs that fail."""
    return str(config.hydra.sweeper._target_).endswith(".BasicSweeper")
