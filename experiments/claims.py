"""Classic claims on compression, each tried by a sweep of ``conf/experiment/claims``: the table by what is compared.

``python -m experiments.claims gradual`` runs the sweep and prints mean and sample deviation of the accuracy over the
seeds, the same of its differences from the first row's, seed by seed, and the mean bytes of the packed files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from omegaconf import OmegaConf

from lightning_compress import cli

__all__ = ["by_choice", "claims", "table"]

Reports = dict[str, dict[str, Any]]  # of one choice, by seed


def claims() -> list[str]:
    """The names of all claims."""
    return sorted(path.stem for path in Path(__file__).parents[1].glob("conf/experiment/claims/*.yaml"))


def by_choice(folder: Path) -> dict[str, Reports]:
    """The reports of a sweep by what was chosen beside the seed, in the order of the sweep."""
    found: dict[str, Reports] = defaultdict(dict)
    for job in sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name)):
        overrides = OmegaConf.load(job / ".hydra" / "overrides.yaml")
        words = [str(word).split("=", 1) for word in overrides]
        chosen = {name: value for name, value in words if name != "experiment"}
        seed = chosen.pop("seed")
        choice = " ".join(f"{name}={value}" for name, value in chosen.items())
        found[choice][seed] = json.loads((job / "report.json").read_text())
    return found


def table(choices: dict[str, Reports]) -> str:
    """A row a choice; each seed of the first is what the same seed of the others is compared with."""
    first = _metrics(next(iter(choices.values())))
    rows = [_row(choice, reports, first) for choice, reports in choices.items()]
    head = ["chosen", "accuracy, %", "less the first's", "bytes"]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _row(choice: str, reports: Reports, first: dict[str, float]) -> list[str]:
    metrics = _metrics(reports)
    size = mean(report["packed"]["bytes"] for report in reports.values())
    less = _spread([metric - first[seed] for seed, metric in metrics.items()])
    return [choice, _spread([*metrics.values()]), less, f"{size:,.0f}"]


def _metrics(reports: Reports) -> dict[str, float]:
    return {seed: 100 * report["compressed"]["metric"] for seed, report in reports.items()}


def _spread(values: Sequence[float]) -> str:
    """Mean +- sample deviation."""
    return f"{mean(values):.2f}" + (f" +- {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    """Run the sweep of a claim, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=claims())
    parser.add_argument("words", nargs="*", help="of Hydra: other values, such as seed=0,1")
    asked = parser.parse_args()
    folder = Path("outputs", "claims", asked.name, time.strftime("%Y-%m-%d_%H-%M-%S"))
    sys.argv[1:] = ["-m", f"experiment=claims/{asked.name}", f"hydra.sweep.dir={folder}", *asked.words]
    cli.main()
    print(f"\n{table(by_choice(folder))}")


if __name__ == "__main__":
    main()
