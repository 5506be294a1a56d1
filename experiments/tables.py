"""The benchmark's results in words and tables, as README and docs/benchmark.md have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from experiments.arena import MAIN_TASKS, TASKS
from experiments.costs_table import costs
from experiments.methods import ABSENT, METHODS
from experiments.protocol import DENSE, MAIN, POINTS, Point
from experiments.standings import CONTROL, OURS, Cell, Standings

__all__ = ["page", "summary"]

_SIGNS = {"win": ">", "tie": "=", "loss": "<"}


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(cell: Cell) -> str:
    """Mean +- deviation; the reason where there is none."""
    if cell.mean is None:
        return cell.failures[0] if cell.failures else "-"
    return f"{cell.mean:.2f}" + ("" if cell.sd is None else f" +- {cell.sd:.2f}")


def _best(cells: Sequence[Cell], higher: bool) -> Cell | None:
    """The one with the best mean."""
    known = [cell for cell in cells if cell.mean is not None]
    return max(known, key=lambda cell: (cell.mean or 0.0) * (1 if higher else -1), default=None)


def _beside(standings: Standings, task: str, point: Point) -> str:
    """Ours and the best peer at a point of a task."""
    cells = list(standings.cells([task], [point]))
    ours = next((cell for cell in cells if cell.method == OURS), None)
    peer = _best([cell for cell in cells if cell.role == "peer"], TASKS[task].metric.higher)
    if ours is None:
        return "-"
    if peer is None:
        return f"{_value(ours)}, no peer was run"
    sign = _SIGNS[peer.compared.verdict] if peer.compared else "?"
    return f"{_value(ours)} {sign} {_value(peer)} ({peer.method})"


def _counts(cells: Iterable[Cell]) -> Counter[str]:
    return Counter(cell.compared.verdict for cell in cells if cell.compared)


def _tasks(standings: Standings) -> list[str]:
    """Those of the main table, then the others that were run."""
    ran = {trial.task for trial in standings.records.outcomes}
    return [*(name for name in MAIN_TASKS if name in ran), *(name for name in TASKS if name in ran - set(MAIN_TASKS))]


def _counted(standings: Standings) -> str:
    cells = list(standings.cells(MAIN_TASKS, MAIN))
    peers = _counts(cell for cell in cells if cell.role == "peer")
    controls = _counts(cell for cell in cells if cell.role == "control")
    told = [f"wins {c['win']}, ties {c['tie']}, losses {c['loss']}" for c in (peers, controls)]
    return f"Ours against a peer in the main table: {told[0]}; against a control: {told[1]}."


def summary(standings: Standings) -> str:
    """README's table: ours beside the best peer of each cell."""
    tasks = [name for name in _tasks(standings) if name in MAIN_TASKS]
    head = ["", *tasks]
    rows = [[str(point), *(_beside(standings, task, point) for task in tasks)] for point in MAIN]
    dense = [standings.cell(task, DENSE, CONTROL) for task in tasks]
    rows.insert(0, ["dense, trained on", *(_value(cell) if cell else "-" for cell in dense)])
    return f"{_markdown(head, rows)}\n\n{_counted(standings)}"


def _row(cell: Cell) -> list[str]:
    size, faster = cell.average("zstd"), cell.times_faster
    compared = cell.compared
    beside = ""
    if compared:
        beside = f"{_SIGNS[compared.verdict]} {compared.difference:+.2f} +- {compared.error:.2f}"
    return [
        cell.method if cell.role != "control" else f"*{cell.method}*",
        f"**{_value(cell)}**" if cell.method == OURS else _value(cell),
        "-" if cell.gap is None else f"{cell.gap:+.2f}",
        "-" if size is None else f"{size / 1e3:.1f}",
        "-" if faster is None else f"{faster:.2f}",
        f"{cell.factor:g}x",
        str(len(cell.values)),
        beside,
        "; ".join(cell.failures) if cell.mean is not None else "",
    ]


def _section(standings: Standings, task: str) -> str:
    metric = TASKS[task].metric
    way = "more is better" if metric.higher else "less is better"
    lines = [f"## {task}", f"{metric.name}, {way}.", f"![Frontier of {task}](benchmark/{task}.svg)"]
    head = ["method", "file", "file - model", "KB", "times faster", "rate", "seeds", "ours beside it", "failed"]
    for point in (DENSE, *POINTS):
        cells = list(standings.cells([task], [point]))
        if cells:
            lines += [f"### {task}: {point}", _markdown(head, (_row(cell) for cell in cells))]
    return "\n\n".join(lines)


def _made(standings: Standings) -> str:
    """Where and by what it was made."""
    used = sorted({outcome["by"] for outcome in standings.records.outcomes.values()})
    made = [standings.records.made[i] for i in used]
    rows = [[f"`{m['command']}`", m["commit"], m["date"], m["torch"], f"{m['cpu']} ({m['features']})"] for m in made]
    return _markdown(["command", "commit", "date", "torch", "CPU"], rows)


def _versions(standings: Standings) -> str:
    found: dict[str, str] = {}
    for trial, outcome in standings.records.outcomes.items():
        if outcome.get("version"):
            found[METHODS[trial.method, trial.kind].package] = outcome["version"]
    return ", ".join(f"{package} {version}" for package, version in sorted(found.items()))


_INTRODUCTION = """# The benchmark

Written by `python -m experiments.bench report` from `experiments/results/proof.json`. `make bench` makes that file, and
goes on where it was stopped. A row is repeated by its task, point and method, such as `python -m experiments.bench
proof --task fsdd --point zeros=0.95 --method ours --results again.json`.

A dense model is trained once a task and seed, and kept. From there every method takes the same steps on the same
batches. Its learning rate is the best of three on a sixth of the training part (emoji: on three of its sixths, as one
has 254 pictures). Then it is trained on the whole training part and tested once, after the last step, by the file that
ships in its runtime.

- *file - model*: what that file lost or won against the model in PyTorch. *KB*: of the file, after zstd; a weight
  that a mask multiplies becomes 0 or -0 by its sign, which costs a bit of each, ours becomes 0. *times faster*: than
  the dense model's file at batch 1, taken in turn.
- *ours beside it*: the mean difference on the same seeds and its standard error. More than two of these and more than
  .3 points (.01 bits) is a win (>) or a loss (<), all else a tie (=). Of three seeds two standard errors are little:
  methods that are alike pass them in about one comparison of six, either way.
- Controls are in italics. A *small dense* model is narrower, no larger than what the others leave, and trained from
  scratch for as long as dense and compressed training together."""


def page(standings: Standings) -> str:
    """docs/benchmark.md."""
    parts = [_INTRODUCTION, summary(standings), _made(standings), _versions(standings) + "."]
    if ABSENT:
        absent = _markdown(["tool", "why it is not here"], ([name, reason] for name, reason in ABSENT.items()))
        parts.append(f"## Tools that are not here\n\n{absent}")
    parts += [_section(standings, task) for task in _tasks(standings)]
    parts += [told for told in [costs(standings.records.path.with_name("costs.json"))] if told]
    return "\n\n".join(parts) + "\n"
