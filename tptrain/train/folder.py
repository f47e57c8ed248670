"""The run's folder: what may be there before a run starts, and what lies where."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tptrain.ckpt.steps import saved_steps
from tptrain.config.kept_steps import most_kept
from tptrain.config.plan import Plan
from tptrain.errors import Problem
from tptrain.family.table import DTYPE_BYTES
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

    def steps(self, unverified: bool = False) -> list[int]:
        """Published checkpoint steps, oldest first; unverified: also those without a digest manifest."""
        return saved_steps(self.checkpoints, unverified)

    def step(self, number: int) -> Path:
        return self.checkpoints / str(number)


def resumes(plan: Plan, folder: RunFolder) -> bool:
    """Whether a run goes on from a checkpoint, and does not start anew."""
    recipe = plan.recipe
    return recipe.resume != "never" and bool(folder.steps(recipe.unverified))


def step_asked_for(plan: Plan) -> int | None:
    """The step that the recipe names, or None for the newest good one."""
    return int(plan.recipe.resume) if plan.recipe.resume.isdecimal() else None


def folder_problems(plan: Plan, folder: RunFolder) -> list[Problem]:
    """Why this run could not write where it is to write; looked at before anything is loaded."""
    place = _place_problem(folder.root)
    if place is not None:
        return [place]
    problems = [*_resume_problems(plan, folder), *_room_problems(plan, folder)]
    # Of a run that goes on it is looked at later: it may be finished, export and all.
    return problems if resumes(plan, folder) else [*problems, *export_problems(plan)]


def export_problems(plan: Plan) -> list[Problem]:
    """Why the export at the end of the run could not be written."""
    if plan.export_dir is None:
        return []
    needed = export_bytes(plan.exported, plan.recipe.export.dtype)
    return check_export_target(Path(plan.export_dir), "export.path", needed)


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
    resume, steps = plan.recipe.resume, folder.steps(plan.recipe.unverified)
    if resume == "never" and folder.root.exists() and any(folder.root.iterdir()):
        newest = f"newest step {steps[-1]}" if steps else "no checkpoint"
        rule = "must be a new or empty folder when resume=never"
        fix = "resume=auto to go on with it, or another output_dir"
        return [Problem("output_dir", folder.root, rule, f"it holds a run, {newest}", fix)]
    if steps and resume != "never" and not folder.assets.is_dir():
        rule, other = "must hold the assets of the run that is to go on", f"no folder {folder.assets}"
        return [Problem("output_dir", folder.root, rule, other, "another output_dir")]
    if resume in ("never", "auto") or int(resume) in steps:
        return []
    if int(resume) in folder.steps(unverified=True):
        rule, other = "must be a step with a digest manifest", f"{folder.step(int(resume))} has none"
        return [Problem("resume", resume, rule, other, "another step, auto, or --unverified beside it")]
    known = ", ".join(map(str, steps)) or "none"
    rule, other = "must be a step that was saved", f"steps in {folder.checkpoints}: {known}"
    return [Problem("resume", resume, rule, other, "one of them, or auto")]


def _room_problems(plan: Plan, folder: RunFolder) -> list[Problem]:
    """Too little room for the checkpoints that are kept, and the one that is written beside them."""
    kept = most_kept(plan)
    rows = [row for part in plan.parts.values() for row in part.rows if row.saved]
    one = sum(row.num_elements * DTYPE_BYTES[row.storage_dtype] for row in rows)
    missing = kept + 1 - min(len(folder.steps(plan.recipe.unverified)), kept)
    free = shutil.disk_usage(nearest_existing(folder.root / "inside")).free
    if missing * one <= free:
        return []
    rule = f"must lie on a disk with room for {missing} checkpoints of {one / 1e9:.3g} GB"
    return [Problem("output_dir", folder.root, rule, f"free: {free / 1e9:.3g} GB", _fix(plan, free // one))]


def _fix(plan: Plan, room: int) -> str:
    """What would pass where the disk has room for so many checkpoints."""
    save = plan.recipe.save
    if room < 2:
        return "another disk"
    beside = [f"save.{name}=0" for name in ("keep_every", "keep_best") if getattr(save, name)]
    return f"another disk, or {' '.join([f'save.keep_last={room - 1}', *beside])}"
