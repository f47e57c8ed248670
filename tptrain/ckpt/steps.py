"""The folder of a run's checkpoints: which steps are there, which are complete, and setting one aside.

`checkpoints/STEP` is a step. One with a digest manifest is published; one without was not finished, or was
written by another program. Whatever has a name that is not a number is no step of the run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tptrain.ckpt.digests import MANIFEST, ManifestError, read_manifest
from tptrain.ckpt.policies import SavedStep
from tptrain.config.metrics import EXACT_MATCH, is_better
from tptrain.config.state_parts import PARAMS
from tptrain.errors import refuse

# The item of a step that is no part of the state: what a run needs to go on.
RUN = "run"

# What Orbax's JsonCheckpointHandler names the file of that item.
RUN_FILE = "metadata"

_DELETING = ".deleting"
_ORBAX_PARTIAL = ".orbax-checkpoint-tmp"


def is_step_folder(path: Path) -> bool:
    """Whether a folder holds what Orbax commits for a step of ours."""
    return (path / PARAMS).is_dir() and (path / RUN).is_dir()


def is_published(path: Path) -> bool:
    """Whether a step is complete: its manifest is written last."""
    return is_step_folder(path) and (path / MANIFEST).is_file()


def saved_steps(folder: Path, unverified: bool = False) -> list[int]:
    """Published steps in a `checkpoints` folder, oldest first. unverified: also those without a manifest."""
    if not folder.is_dir():
        return []
    is_one = is_step_folder if unverified else is_published
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and is_one(p))


def with_metrics(folder: Path) -> list[SavedStep]:
    """Published steps with the scores in their manifests; one whose manifest is damaged has no scores."""
    found = []
    for step in saved_steps(folder):
        try:
            metrics = read_manifest(folder / str(step)).metrics
        except ManifestError:
            metrics = {}
        found.append(SavedStep(step, metrics))
    return found


def set_aside(folder: Path, step: int, why: str) -> Path:
    """Rename a step to `STEP.<why>-<n>`, so that it is no step any more and nothing of it is lost."""
    number = 1
    while (target := folder / f"{step}.{why}-{number}").exists():
        number += 1
    os.rename(folder / str(step), target)
    return target


def delete_step(folder: Path, step: int) -> None:
    """Remove a step. It stops being one at once: a crash on the way leaves no half of it under its name."""
    doomed = folder / f"{step}{_DELETING}"
    os.rename(folder / str(step), doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left: saves that were not committed, halves of deletions."""
    for path in folder.iterdir():
        if path.name.endswith(_DELETING) or _ORBAX_PARTIAL in path.name:
            shutil.rmtree(path)


def find_step(path: Path, setting: str, which: str = "latest") -> Path:
    """The step folder that a path means: a step itself, or a step of a run or of a `checkpoints` folder.

    which: "latest", "best" (by what the run calls so, see `best_step`), or the number of a step.
    """
    if is_step_folder(path):
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = saved_steps(folder)
    if not steps:
        without = saved_steps(folder, unverified=True)
        other = f"no step in {folder}"
        if without:
            other += f" has a digest manifest (without one: {_listed(without)})"
        rule = "must be a checkpoint step, or a run that has one"
        raise refuse(setting, path, rule, other, "RUN/checkpoints/STEP")
    if which == "latest":
        return folder / str(steps[-1])
    if which == "best":
        return folder / str(_best(folder, setting))
    if which.isdecimal() and int(which) in steps:
        return folder / which
    rule, other = "must be a step that was saved, latest or best", f"steps in {folder}: {_listed(steps)}"
    raise refuse("--from-step", which, rule, other, f"{steps[-1]}")


def best_step(folder: Path, metric: str) -> SavedStep | None:
    """The published step with the best `metric`, of equal ones the newest; None where no step has it."""
    best: SavedStep | None = None
    for saved in with_metrics(folder):
        score = saved.metrics.get(metric)
        if score is not None and (best is None or not is_better(metric, best.metrics[metric], score)):
            best = saved
    return best


def _best(folder: Path, setting: str) -> int:
    metric = best_metric_of(folder)
    best = best_step(folder, metric)
    if best is None:
        rule = "must have scored steps for --from-step best"
        other = f"no step has the score {metric}"
        raise refuse(setting, folder, rule, other, "--from-step latest, or a run with eval.every_steps")
    return best.step


def best_metric_of(folder: Path) -> str:
    """What makes a step of a run the best one: the run's save.best_metric, as its newest step has it.

    Runs from before there was a choice, and steps whose `run` item cannot be read, go by exact match.
    """
    for step in reversed(saved_steps(folder)):
        try:
            metric = read_run(folder / str(step)).get("best_metric")
        except (OSError, ValueError):
            continue
        return metric if isinstance(metric, str) else EXACT_MATCH
    return EXACT_MATCH


def read_run(step_folder: Path) -> dict[str, Any]:
    """The JSON item of a step: step, cursor, seeds, recipe, config, versions.

    Read as the file it is: through Orbax it would start JAX, whose devices a run has yet to set up.
    Raises OSError or ValueError for what is no such item.
    """
    run = json.loads((step_folder / RUN / RUN_FILE).read_text(encoding="utf-8"))
    if not isinstance(run, dict):
        raise ValueError(f"{step_folder / RUN} holds a {type(run).__name__}")
    return run


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(str(step) for step in steps)
