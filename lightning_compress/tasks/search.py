"""A budget instead of hyper-parameters: the largest model whose file meets it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lightning_compress.checks import is_number
from lightning_compress.files import free_folder, write_whole
from lightning_compress.tasks.compose import check, start
from lightning_compress.tasks.device import check_budget, rehearse
from lightning_compress.tasks.progress import counted, tell
from lightning_compress.tasks.trial import Candidate, trial
from lightning_compress.tasks.validation import judge_before_training, validator

if TYPE_CHECKING:
    from lightning_compress.analysis.allocation import Allocation, Point

__all__ = ["Search", "search"]

_FILE = ("bytes", "bytes_zstd", "flash")
_SHIPPED = "deployed minus trained"
BUDGETS = ("bytes", "bytes_zstd", "latency_ms", "macs", "metric_drop", "sram", "flash")


def search(cfg: DictConfig) -> float:
    """Find the model that meets ``cfg.budget``, train it, and measure its file.

    Without ``cfg.init_from`` the dense model is trained first. What the file measures is found by bisection between
    dense and narrow, before anything is trained. A drop of the metric is known only after training: so it is bisected
    by training, ``cfg.search.rounds`` times at most.

    Args:
        cfg: The composed configuration; conf/config.yaml names its fields.

    Returns:
        The metric of the file.

    Raises:
        ValueError: If no budget is given, or none of the models meets it; the nearest is named.
    """
    from rich.console import Console

    budget = {name: value for name, value in cfg.budget.items() if value is not None}
    if not budget or any(name not in BUDGETS or not is_number(value) or value <= 0 for name, value in budget.items()):
        raise ValueError(
            f"budget={dict(cfg.budget)}: accepted is one or more of {', '.join(BUDGETS)}, "
            "each above 0 and a number. Give budget.bytes=20000, for instance."
        )
    check(cfg)
    check_budget(budget, cfg.search.format)
    run = Search(cfg, {name: float(value) for name, value in budget.items()})
    console = Console()
    found = run.within_file_budgets() if "metric_drop" not in budget else run.within_drop()
    console.print(run.table(found))
    if run.write(found):
        console.print(f"search: {run.folder / 'search.json'}", soft_wrap=True)
    return found.metric


class Search:
    """One search: the dense model, the way from it to a small one, and what was tried on it.

    Args:
        cfg: The composed configuration.
        budget: What must not be exceeded.
    """

    def __init__(self, cfg: DictConfig, budget: Mapping[str, float]) -> None:
        self.cfg = cfg.copy()
        self.budget = dict(budget)
        self.folder = free_folder(cfg.dir, ["search.json"])
        self.tried: list[Candidate] = []
        self._probed: dict[int, Candidate] = {}
        self._trained: dict[int, Candidate] = {}
        self._grown = dict.fromkeys(BUDGETS, 1.0)  # by how much a trained file exceeds what was measured before
        self._judge = judge_before_training(cfg, "search")
        rehearse(cfg)
        if cfg.init_from is None:
            trainer, model, data = start(cfg, [], False)
            trainer.fit(model, data)
            self.cfg.init_from = str(self.folder / "dense.ckpt")
            trainer.save_checkpoint(self.cfg.init_from, weights_only=True)
        self.points = self._points()

    def _points(self) -> list[Point]:
        from lightning_compress.analysis.allocation import allocate
        from lightning_compress.deploy.formats import FORMATS, check_formats
        from lightning_compress.forward import record_inputs, with_batch
        from lightning_compress.layers import PRUNABLE, find_layers
        from lightning_compress.quantization import scheme

        options = self.cfg.search
        of = scheme(self.cfg.search.scheme)
        check_formats([options.format])
        _, model, data = start(self.cfg, [], False)
        model = model.cpu().eval()
        validate = validator(self.cfg, data)
        logged = validate(model)
        self.metric = self._judge.see(list(logged))
        self.dense = logged[self.metric]
        self._judge.check_finite(self.dense, "")
        inputs = record_inputs(model, lambda: validate(model))
        if inputs is None:
            raise ValueError("search watches the model's forward, but validation_step never calls self(...). Call it.")
        names = [layer.name for layer in find_layers(model, PRUNABLE, of.include, of.exclude, skip_tied=True)[0]]
        fewer = {name: [b for b in options.bits if b < of.for_layer(name).weight.bits] for name in names}
        wanted = set(self.budget) - {"metric_drop"} or {"bytes"}
        with counted(lambda model: validate(model)[self.metric], f"search: what {len(names)} layers bear") as evaluate:
            return allocate(
                model,
                with_batch(inputs, 2),
                evaluate,
                _cost(wanted, model, with_batch(inputs, 2), of.weight.bits, FORMATS[options.format].weight_bits),
                shares=list(options.levels),
                bits=fewer if wanted & set(_FILE) else {},
                sparsities=list(options.sparsities) if "bytes_zstd" in wanted else [],
                more_is_better=self._judge.mode == "max",
            )

    def within_file_budgets(self) -> Candidate:
        """The largest model whose file meets what can be measured before training; trained."""
        i = self._largest(lambda i: self._meets(self._probe(i)))
        for _ in range(self.cfg.search.rounds):
            found = self._train(i)
            if self._meets(found) or i + 1 >= len(self.points):
                break
            for name in self.budget:  # zeros and codes that training made, or a latency at the edge
                self._grown[name] = max(self._grown[name], getattr(found, name) / getattr(self._probe(i), name))
            i = max(i + 1, self._largest(lambda i: self._meets(self._probe(i))))
        return self._must_meet(found)

    def within_drop(self) -> Candidate:
        """The smallest model within the drop that also meets the other budgets."""
        others = set(self.budget) - {"metric_drop"}
        low = self._largest(lambda i: self._meets(self._probe(i), others)) if others else 0
        high = len(self.points) - 1
        best = None
        for _ in range(self.cfg.search.rounds):
            middle = low if others and best is None else (low + high + 1) // 2
            found = self._train(middle)
            if self._meets(found):
                best = found
                low = middle
            elif middle == low:
                break
            else:
                high = middle - 1
            if low >= high:
                break
        return self._must_meet(best or self._train(low))

    def _largest(self, meets: Callable[[int], bool]) -> int:
        """The first point that meets a budget, by bisection: what a file measures falls along the way."""
        last = len(self.points) - 1
        if not meets(last):
            self._must_meet(self._probe(last))
        low = -1
        high = last
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high

    def _meets(self, candidate: Candidate, names: Any = None) -> bool:
        wanted = self.budget if names is None else {name: self.budget[name] for name in names}
        if not candidate.trained:
            wanted = {name: value / self._grown[name] for name, value in wanted.items() if name != "metric_drop"}
        return all(getattr(candidate, name) <= value + 1e-6 for name, value in wanted.items())

    def _must_meet(self, candidate: Candidate) -> Candidate:
        if self._meets(candidate):
            return candidate
        self.write(None)
        reached = ", ".join(f"{name} {getattr(candidate, name):g} of {value:g}" for name, value in self.budget.items())
        how = f"{self.metric} {candidate.metric:.4f}{'' if candidate.trained else ', untrained'}"
        raise ValueError(
            f"budget={self.budget} cannot be met with {self.cfg.search.scheme}; the nearest reaches "
            f"{reached} ({how}). Raise the budget to that, start from a smaller model, or train longer (search.epochs)."
        )

    def _probe(self, i: int) -> Candidate:
        """A point's file, calibrated and not trained."""
        from lightning_compress.callbacks.evaluate import quiet

        if i not in self._probed:
            with TemporaryDirectory() as folder, quiet():
                options = {"max_epochs": 1, "limit_train_batches": 8, "default_root_dir": folder}
                options |= {"enable_progress_bar": False}
                self._probed[i] = self.fit(self.points[i].plan, Path(folder), False, **options)
            self.tried.append(self._probed[i])
            self._tell("probed, untrained", i, self._probed[i])
        return self._probed[i]

    def _train(self, i: int) -> Candidate:
        if i not in self._trained:
            num = len(self._trained) + 1
            tell(f"search: training {num} of {self.cfg.search.rounds} at most, of point {i} of {len(self.points)}")
            self._trained[i] = self.fit(self.points[i].plan, self.folder / f"point{i}", True)
            self.tried.append(self._trained[i])
            self._tell("trained", i, self._trained[i])
        return self._trained[i]

    def _tell(self, how: str, i: int, candidate: Candidate) -> None:
        """A line on what was tried, beside what is asked for."""
        amounts = {name: getattr(candidate, name) for name in self.budget if candidate.trained or name != "metric_drop"}
        reached = ", ".join(f"{name} {amount:,g} of {self.budget[name]:,g}" for name, amount in amounts.items())
        tell(f"search: point {i} of {len(self.points)}, {how}: {reached}")

    def fit(self, plan: Allocation, folder: Path, trained: bool, **options: object) -> Candidate:
        """A plan, tried."""
        found = trial(self.cfg, plan, folder, self.metric, trained, **options)
        drop = self.dense - found.metric if self._judge.mode == "max" else found.metric - self.dense
        found.metric_drop = round(drop, 7)
        return found

    def write(self, found: Candidate | None) -> bool:
        """search.json in the run's folder; whether it could be written."""
        from lightning_compress.callbacks.outputs import written

        path = self.folder / "search.json"
        state = {
            "budget": self.budget,
            "metric": self.metric,
            "dense": self.dense,
            "met": found is not None,
            "found": None if found is None else asdict(found),
            "tried": [asdict(candidate) for candidate in self.tried],
            "points": [asdict(point) for point in self.points],
            "config": OmegaConf.to_container(self.cfg.search, resolve=True),
        }
        return written(path, lambda: write_whole(path, json.dumps(state, indent=2) + "\n"))

    def table(self, found: Candidate) -> Any:
        """What was tried, the found one marked."""
        from rich import box
        from rich.table import Table

        from lightning_compress.analysis.report import change, short

        wanted = ", ".join(f"{name} {value:g}" for name, value in self.budget.items())
        title = f"budget: {wanted}; dense {self.metric} {self.dense:.4f}"
        shown = Table(title=title, box=box.SIMPLE_HEAD, padding=0, header_style="bold")
        time = "ms @1" if all(c.arena_bytes is None for c in self.tried) else "arena"
        for name in ("", "weights", "bits", "zeros", "bytes", "zstd", time, "MACs", self.metric, "drop", _SHIPPED):
            shown.add_column(name, justify="right" if name else "left", no_wrap=name != _SHIPPED)
        for c in self.tried:
            mark = "found" if c is found else "trained" if c.trained else "probed"
            cells = [short(c.num_params), f"{c.bits:.2f}", f"{c.sparsity:.0%}", f"{c.bytes:,}", f"{c.bytes_zstd:,}"]
            cells += [f"{c.arena_bytes:,}" if c.latency_ms is None else f"{c.latency_ms:.3f}", short(c.macs)]
            cells += [f"{c.metric:.4f}", f"{c.metric_drop:.4f}"] if c.trained else ["-", "-"]
            cells += [change(c.deployed_minus_trained)]
            shown.add_row(mark, *(f" {cell}" for cell in cells), style="bold" if c is found else None)
        return shown


def _cost(wanted: Iterable[str], dense: Any, inputs: Any, bits: int, stored: tuple[int, ...]) -> Any:
    """What a narrowed model and a plan cost of what is budgeted, each in units of the dense model's."""
    from lightning_compress.analysis.allocation import Allocation
    from lightning_compress.analysis.cost import file_bytes
    from lightning_compress.analysis.inspect import count_macs

    def amount(name: str, model: Any, plan: Allocation) -> float:
        if name in _FILE:
            return file_bytes(model, plan, bits, stored, compressed=name == "bytes_zstd")
        return float(count_macs(model, inputs)[""])  # which latency and the values in memory follow

    kinds = {"macs" if name in ("latency_ms", "sram") else name for name in wanted}
    whole = {name: amount(name, dense, Allocation()) for name in kinds}
    return lambda model, plan: sum(amount(name, model, plan) / whole[name] for name in kinds)
