"""The folder of a run's checkpoints: which steps are there, which are complete, and setting one aside.

`checkpoints/STEP` is a step. One with a digest manifest is published; one without was not finished, or was
written by another program. Whatever has a name that is not a number is no step of the run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tptrain.ckpt.digests import MANIFEST, ManifestError, read_manifest
from tptrain.ckpt.policies import SavedStep
from tptrain.config.state_parts import PARAMS
from tptrain.errors import refuse

# The item of a step that is no part of the state: what a run needs to go on.
RUN = "run"

BEST_METRIC = "exact_match"

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

    which: "latest", "best" (the highest held-out score), or the number of a step.
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


def _best(folder: Path, setting: str) -> int:
    scored = [s for s in with_metrics(folder) if BEST_METRIC in s.metrics]
    if not scored:
        rule = "must have scored steps for --from-step best"
        other = f"no step has the score {BEST_METRIC}"
        raise refuse(setting, folder, rule, other, "--from-step latest, or a run with eval.every_steps")
    return max(scored, key=lambda s: (s.metrics[BEST_METRIC], s.step)).step


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(str(step) for step in steps)
