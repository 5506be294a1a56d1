"""A sweep that Optuna steers: ``hydra/sweeper=study``.

Hydra's own Optuna sweeper pins an Optuna that cannot store a study. This one asks and tells: the study stands in a
database, each trial is a job of whatever launcher there is, and a sweep that was killed goes on with what is missing.
A job writes down what it returns, so that one which ended just before a kill is not done again.
What is tried depends on the study's past and the trial's number alone, so it is the same with and without a kill.

Hydra imports every module below ``hydra_plugins`` when it starts: Optuna is imported when a sweep begins.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

_log = logging.getLogger(__name__)


class StudySweeper(Sweeper):
    """Asks Optuna what to try next.

    Args:
        num_trials: Trials of the study in all; those that an earlier sweep completed count, and those that the task
            gave up, of which it returns nan.
        num_parallel: Trials that are launched together.
        directions: ``"maximize"`` or ``"minimize"`` for each objective that the task returns.
        storage: Where the study stands; a file beside the jobs without one.
        study_name: Its name there.
        seed: Of what is tried.
        params: What is searched, in Hydra's grammar: ``choice(a,b)``, ``interval(0.5,0.9)``, ``range(1,5)``, or
            ``tag(log,interval(1e-3,1e-1))``.
    """

    def __init__(
        self,
        num_trials: int = 20,
        num_parallel: int = 1,
        directions: Sequence[str] = ("maximize",),
        storage: str | None = None,
        study_name: str = "study",
        seed: int = 0,
        params: dict[str, str] | None = None,
    ) -> None:
        self.num_trials, self.num_parallel = num_trials, num_parallel
        self.directions: list[Any] = list(directions)
        self.storage, self.study_name, self.seed, self.params = storage, study_name, seed, dict(params or {})
        for name, value in (("num_trials", num_trials), ("num_parallel", num_parallel)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"hydra.sweeper.{name}={value!r}: accepted is a whole number from 1.")
        if not self.directions or any(d not in ("maximize", "minimize") for d in self.directions):
            raise ValueError(
                f"hydra.sweeper.directions={self.directions}: accepted is 'maximize' or 'minimize' for each objective."
            )

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what a sweep needs."""
        self.hydra_context: Any = hydra_context
        self.config: Any = config
        folder = Path(config.hydra.sweep.dir).absolute()
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=partial(_noted, task_function, str(folder)), config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run what is missing of the trials; gives the best ones: their numbers, values and parameters."""
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "hydra/sweeper=study asks Optuna. Run: pip install 'lightning-compress[optuna]'"
            ) from error
        from lightning_compress.files import write_whole

        fixed, searched = self._split(arguments)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "multirun.yaml", OmegaConf.to_yaml(self.config))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=self.storage or f"sqlite:///{folder / 'study.db'}",
            study_name=self.study_name,
            directions=self.directions,
            load_if_exists=True,
        )
        states = optuna.trial.TrialState
        for left in study.get_trials(deepcopy=False, states=(states.RUNNING,)):  # when an earlier sweep was killed
            values = _read_note(folder, left)
            if values is not None:
                _log.info("trial %d had ended when the sweep was killed; its values count", left.number)
            study.tell(left.number, **({"state": states.FAIL} if values is None else _told(values)))
        over = (states.COMPLETE, states.PRUNED)
        while (num_left := self.num_trials - len(study.get_trials(deepcopy=False, states=over))) > 0:
            num_broken = sum("reason" in trial.user_attrs for trial in study.get_trials(deepcopy=False))
            if num_broken >= max(3, self.num_trials // 2):
                raise RuntimeError(
                    f"{num_broken} trials of the study failed; the log has their reasons. Fix the cause."
                )
            # a killed trial is tried again, a broken one is not
            study.sampler = optuna.samplers.TPESampler(seed=self.seed + self.num_trials - num_left + num_broken)
            trials = [study.ask() for _ in range(min(self.num_parallel, num_left))]
            jobs = [[*fixed, *(f"{name}={_suggest(t, name, o)}" for name, o in searched.items())] for t in trials]
            self.validate_batch_is_legal(jobs)
            for trial, job in zip(trials, self.launcher.launch(jobs, initial_job_idx=trials[0].number), strict=True):
                try:
                    study.tell(trial, **_told(_values(job.return_value)))
                except Exception as error:  # a trial that breaks is a failed one, not the end of the study
                    _log.warning("trial %d failed: %s: %s", trial.number, type(error).__name__, error)
                    trial.set_user_attr("reason", f"{type(error).__name__}: {error}")
                    study.tell(trial, state=states.FAIL, skip_if_finished=True)
        best = [{"trial": t.number, "values": t.values, "params": t.params} for t in study.best_trials]
        results = OmegaConf.create({"name": "study", "best": best})
        write_whole(folder / "optimization_results.yaml", OmegaConf.to_yaml(results))
        return best

    def _split(self, arguments: list[str]) -> tuple[list[str], dict[str, Override]]:
        """What is the same for all trials, and what is searched."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        lines = [*(f"{name}={value}" for name, value in self.params.items()), *arguments]
        found = {override.get_key_element(): override for override in parser.parse_overrides(lines)}  # the last counts
        searched = {name: override for name, override in found.items() if override.is_sweep_override()}
        for override in searched.values():
            if not isinstance(override.value(), ChoiceSweep | IntervalSweep | RangeSweep):
                raise ValueError(f"{override.input_line}: accepted are choice(...), interval(...) and range(...).")
        return [str(o.input_line) for name, o in found.items() if name not in searched], searched


def _values(returned: Any) -> list[Any]:
    """What a task returned, an objective each."""
    return list(returned) if isinstance(returned, list | tuple) else [returned]


def _told(values: list[Any]) -> dict[str, Any]:
    """What the study is told of them; nan all over of a trial that the task gave up."""
    from optuna.trial import TrialState

    hopeless = all(isinstance(value, float) and math.isnan(value) for value in values)
    return {"state": TrialState.PRUNED} if hopeless else {"values": values}


def _note(folder: str | Path, number: int) -> Path:
    return Path(folder, ".returned", f"{number}.json")


def _noted(task_function: TaskFunction, folder: str, cfg: DictConfig) -> Any:
    """A job, which writes down what it returns: the sweep may be killed before it tells the study."""
    from lightning_compress.files import write_whole

    returned = task_function(cfg)
    try:
        content = json.dumps([float(value) for value in _values(returned)])
        write_whole(_note(folder, HydraConfig.get().job.num), content)
    except (TypeError, ValueError, OSError) as error:  # no numbers, or a full disk: the study says what it takes
        _log.debug("nothing was noted of this job: %s", error)
    return returned


def _read_note(folder: Path, trial: Any) -> list[float] | None:
    """What a trial's job returned; None where it did not get that far, or an earlier study's had this number."""
    path = _note(folder, trial.number)
    try:
        return json.loads(path.read_text()) if path.stat().st_mtime >= trial.datetime_start.timestamp() else None
    except (OSError, ValueError):
        return None


def _suggest(trial: Any, name: str, override: Override) -> Any:
    value: Any = override.value()
    if isinstance(value, ChoiceSweep):
        return trial.suggest_categorical(name, list(override.sweep_iterator(transformer=Transformer.encode)))
    is_range = isinstance(value, RangeSweep)
    low, high = value.start, value.stop - value.step if is_range else value.end
    options: dict[str, Any] = {"step": value.step} if is_range else {"log": "log" in value.tags}
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, **options)
    return trial.suggest_float(name, float(low), float(high), **options)


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="study",
    node={
        "_target_": "hydra_plugins.lightning_compress_study.StudySweeper",
        "num_trials": 20,
        "num_parallel": 1,
        "directions": ["maximize"],
        "storage": None,
        "study_name": "study",
        "seed": 0,
        "params": {},
    },
    provider="lightning_compress",
)
