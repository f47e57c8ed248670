"""Draw loss, gradient norm, learning rate and tokens per second of one or more runs into one PNG.

    python tools/plot_runs.py runs/tiny_gsm8k
    python tools/plot_runs.py runs/a runs/b --out compared.png

Numbers come from each run's journal.jsonl, also while the run goes on. Long runs are drawn twice: every step
in a faint line, and the mean over a window of steps around each step in a strong one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tptrain.errors import Problem, ProblemsError, TptrainError, raise_if_any, refuse
from tptrain.train.journal import JOURNAL_FILE, StepRecord, read_journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OK, _REFUSED = 0, 2
# A run of this many steps or fewer is drawn step by step; a longer one also as a mean over 1/20 of it.
_SHORT_STEPS = 60
_WINDOWS_PER_RUN = 20


@dataclass(frozen=True)
class Panel:
    """One of the four drawings. smooth: whether a long run is averaged."""

    title: str
    value: Callable[[StepRecord], float]
    scale: str
    smooth: bool


PANELS = (
    Panel("Loss (mean over counted tokens)", lambda r: r.loss, "linear", True),
    Panel("Gradient norm (before clipping)", lambda r: r.grad_norm, "log", True),
    Panel("Learning rate", lambda r: r.learning_rate, "linear", False),
    Panel("Tokens per second (without padding)", lambda r: r.tokens_per_second, "linear", True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw. Returns the exit code: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the PNG; default: curves.png")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs)
        write(draw(runs), args.out.expanduser())
    except TptrainError as error:
        print(f"plot_runs: {error}", file=sys.stderr)
        return _REFUSED
    steps = ", ".join(f"{name} to step {records[-1].step}" for name, records in runs.items())
    print(f"{args.out}: {steps}")
    return _OK


def read_runs(folders: Sequence[Path]) -> dict[str, list[StepRecord]]:
    """The journals of the runs by the name each gets in the legend. Raises all problems together."""
    problems: list[Problem] = []
    runs = {}
    for folder, name in zip(folders, legend_names(folders), strict=True):
        try:
            runs[name] = read_run(folder.expanduser())
        except ProblemsError as error:
            problems.extend(error.problems)
    raise_if_any(problems)
    return runs


def read_run(folder: Path) -> list[StepRecord]:
    """The journal of one run, which has at least one step."""
    path = folder / JOURNAL_FILE
    if not path.is_file():
        there = f"no {JOURNAL_FILE} in it" if folder.is_dir() else "no such folder"
        raise refuse("RUN", folder, "must be the folder of a run", there, "the output_dir of a run")
    try:
        records = read_journal(path)
    except (json.JSONDecodeError, TypeError) as error:
        rule, other = f"must have a {JOURNAL_FILE} of this tptrain", f"{type(error).__name__}: {error}"
        raise refuse("RUN", folder, rule, other, "a run of this version") from error
    if not records:
        fix = "a run that has finished a step"
        raise refuse("RUN", folder, "must have at least one step", f"{JOURNAL_FILE} holds none", fix)
    return records


def legend_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, and more of it where those are alike."""
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    paths = [str(folder) for folder in folders]
    return [path if paths.count(path) == 1 else f"{path} ({i})" for i, path in enumerate(paths, start=1)]


def draw(runs: dict[str, list[StepRecord]]) -> Figure:
    """The four panels, one colour per run."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(2, 2, figsize=(12, 7.5), dpi=120, sharex=True, layout="constrained")
        for axes, panel in zip(grid.flat, PANELS, strict=True):
            _draw_panel(axes, panel, runs)
        for axes in grid[1]:
            axes.set_xlabel("Step")
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4), frameon=False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: dict[str, list[StepRecord]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for index, (name, records) in enumerate(runs.items()):
        steps = [record.step for record in records]
        values = [panel.value(record) for record in records]
        colour = f"C{index % 10}"
        if not panel.smooth or len(values) <= _SHORT_STEPS:
            # Runs may share a curve, such as the learning rate: gaps let the one below show.
            style = "-" if index == 0 or panel.smooth else (index, (4, 4))
            axes.plot(steps, values, color=colour, linewidth=1.8, linestyle=style, label=name)
            continue
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        smooth = centred_mean(values, len(values) // _WINDOWS_PER_RUN)
        axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
    axes.set_title(panel.title, loc="left")
    axes.grid(alpha=0.25)
    if panel.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif max(panel.value(record) for records in runs.values() for record in records) >= 1000:
        axes.yaxis.set_major_formatter("{x:,.0f}")


def centred_mean(values: Sequence[float], window: int) -> np.ndarray:
    """The mean over `window` values around each one; near an end, over fewer, as many on each side.

    Values that are not finite, of steps that were skipped, count nowhere; NaN where there are no others.
    """
    known = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, len(values) - 1 - places), window // 2)
    found = counts[places + reach + 1] - counts[places - reach]
    sums = totals[places + reach + 1] - totals[places - reach]
    return np.where(found > 0, sums / np.maximum(found, 1), np.nan)


def write(figure: Figure, out: Path) -> None:
    """Write the PNG, replacing an earlier one."""
    if out.suffix.lower() != ".png":
        other = f"its ending is {out.suffix or 'none'}"
        raise refuse("--out", out, "must be a PNG file", other, str(out.with_suffix(".png")))
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        reason = error.strerror or str(error)
        raise refuse("--out", out, "must be a file that can be written", reason, "curves.png") from error


if __name__ == "__main__":
    sys.exit(main())
