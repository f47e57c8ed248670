"""The run's folder: what may be there before a run starts, and what lies where."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tptrain.ckpt.reading import is_step_folder
from tptrain.config.plan import Plan
from tptrain.errors import Problem
from tptrain.family import ModelFacts, facts_from_config, stored_rows
from tptrain.family.table import DTYPE_BYTES
from tptrain.report.plan_page import plan_json
from tptrain.train.state import PARTS
from tptrain.weights import check_export_target, export_bytes
from tptrain.weights.staging import nearest_existing


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `output_dir`."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def assets(self) -> Path:
        return self.root / "assets"

    def steps(self) -> list[int]:
        """Published checkpoint steps, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [p for p in self.checkpoints.iterdir() if p.name.isdigit() and is_step_folder(p)]
        return sorted(int(p.name) for p in found)

    def step(self, number: int) -> Path:
        return self.checkpoints / str(number)


def step_to_resume(plan: Plan, folder: RunFolder) -> int | None:
    """The step a run goes on from, or None to start anew."""
    resume = plan.recipe.resume
    if resume == "never":
        return None
    if resume == "auto":
        return max(folder.steps(), default=None)
    return int(resume)


def folder_problems(plan: Plan, folder: RunFolder) -> list[Problem]:
    """Why this run could not write where it is to write; looked at before anything is loaded."""
    place = _place_problem(folder.root)
    if place is not None:
        return [place]
    problems = [*_resume_problems(plan, folder), *_room_problems(plan, folder)]
    if plan.export_dir is not None:
        needed = export_bytes(plan.table, plan.recipe.export.dtype)
        problems += check_export_target(Path(plan.export_dir), "export.path", needed)
    return problems


def _place_problem(root: Path) -> Problem | None:
    """Why nothing can be written to `output_dir`: no local path, a file, no permission."""
    if ":/" in str(root):
        return Problem(
            "output_dir", root, "must be a local folder", "it names another file system", "runs/NAME"
        )
    in_the_way = next((p for p in (root, *root.parents) if p.is_file()), None)
    if in_the_way is not None:
        return Problem("output_dir", root, "must be a folder", f"{in_the_way} is a file", "another path")
    existing = nearest_existing(root / "inside")
    if not os.access(existing, os.W_OK | os.X_OK):
        rule, other = "must lie in a folder that you may write to", f"{existing} is not"
        return Problem("output_dir", root, rule, other, "another path")
    return None


def _resume_problems(plan: Plan, folder: RunFolder) -> list[Problem]:
    resume, steps = plan.recipe.resume, folder.steps()
    if resume == "never" and folder.root.exists() and any(folder.root.iterdir()):
        newest = f"newest step {steps[-1]}" if steps else "no checkpoint"
        rule = "must be a new or empty folder when resume=never"
        fix = "resume=auto to go on with it, or another output_dir"
        return [Problem("output_dir", folder.root, rule, f"it holds a run, {newest}", fix)]
    if resume in ("never", "auto"):
        return []
    if int(resume) not in steps:
        known = ", ".join(map(str, steps)) or "none"
        rule, other = "must be a step that was saved", f"steps in {folder.checkpoints}: {known}"
        return [Problem("resume", resume, rule, other, "one of them, or auto")]
    if int(resume) < steps[-1]:
        # The steps after it would mix with those of the run that starts over from it.
        rule, other = "must be the newest step of the run", f"newest step {steps[-1]}"
        fix = f"auto, or {resume} after moving the newer steps out of {folder.checkpoints}"
        return [Problem("resume", resume, rule, other, fix)]
    return []


def _room_problems(plan: Plan, folder: RunFolder) -> list[Problem]:
    """Too little room for the checkpoints that are kept, and the one that is written beside them."""
    kept = plan.recipe.save.keep_last
    rows = stored_rows(plan.table)
    one = len(PARTS) * sum(row.num_elements * DTYPE_BYTES[row.storage_dtype] for row in rows)
    missing = kept + 1 - min(len(folder.steps()), kept)
    free = shutil.disk_usage(nearest_existing(folder.root / "inside")).free
    if missing * one <= free:
        return []
    rule = f"must lie on a disk with room for {missing} checkpoints of {one / 1e9:.3g} GB"
    fix = "another disk" + (f", or save.keep_last={max(free // one - 1, 1)}" if free >= 2 * one else "")
    return [Problem("output_dir", folder.root, rule, f"free: {free / 1e9:.3g} GB", fix)]


def length_problems(plan: Plan, total_steps: int, done_steps: int) -> list[Problem]:
    """What only the records can tell: a warm-up or a finished part longer than the run."""
    schedule = plan.recipe.schedule
    problems = []
    if schedule.warmup_steps >= total_steps:
        rule, fix = "must be less than the steps of the run", f"{max(total_steps // 10, 0)}"
        other = f"{total_steps} steps with these records"
        problems.append(Problem("schedule.warmup_steps", schedule.warmup_steps, rule, other, fix))
    if done_steps > total_steps:
        setting = "schedule.max_steps" if schedule.max_steps is not None else "schedule.epochs"
        value = schedule.max_steps if schedule.max_steps is not None else schedule.epochs
        other = f"step {done_steps} is saved, the run would end at {total_steps}"
        rule = "must reach beyond the step that the run goes on from"
        problems.append(Problem(setting, value, rule, other, f"more, for at least {done_steps} steps"))
    return problems


# Settings under `data.` that only say where the records are.
_PLACES_OF_DATA = ("data.path", "data.subset", "data.split")


def continuation_problems(plan: Plan, run: Mapping[str, Any]) -> list[Problem]:
    """What keeps a plan from going on with a saved run: another order of the data, or another model.

    run: the `run` item of the step. Its cursor counts samples of the same records, shuffled and split alike.
    """
    asked, saved = plan_json(plan)["recipe"], run["recipe"]
    problems = []
    for setting, value in asked.items():
        changed = setting in saved and saved[setting] != value
        if changed and setting.startswith("data.") and setting not in _PLACES_OF_DATA:
            rule = "must stay as it was when a run goes on"
            problems.append(
                Problem(setting, value, rule, f"saved with {saved[setting]}", str(saved[setting]))
            )
    theirs = facts_from_config(run["hf_config"])
    for field in fields(ModelFacts):
        ours, old = getattr(plan.facts, field.name), getattr(theirs, field.name)
        if ours != old:
            rule = "must stay as it was when a run goes on"
            problems.append(Problem(f"model.config.{field.name}", ours, rule, f"saved with {old}", str(old)))
    return problems
