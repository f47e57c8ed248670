"""The run's folder: what may be there before a run starts, and what lies where."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tptrain.ckpt.reading import is_step_folder
from tptrain.config.plan import Plan
from tptrain.errors import Problem
from tptrain.family import stored_rows
from tptrain.family.table import DTYPE_BYTES
from tptrain.train.state import PARTS
from tptrain.weights import check_export_target, export_bytes


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
    problems = []
    resume, steps = plan.recipe.resume, folder.steps()
    if resume == "never" and folder.root.exists() and any(folder.root.iterdir()):
        newest = f"newest step {steps[-1]}" if steps else "no checkpoint"
        rule = "must be a new or empty folder when resume=never"
        fix = "resume=auto to go on with it, or another output_dir"
        problems.append(Problem("output_dir", folder.root, rule, f"it holds a run, {newest}", fix))
    if resume not in ("never", "auto") and int(resume) not in steps:
        known = ", ".join(map(str, steps)) or "none"
        rule, other = "must be a step that was saved", f"steps in {folder.checkpoints}: {known}"
        problems.append(Problem("resume", resume, rule, other, "one of them, or auto"))
    problems += _room_problems(plan, folder)
    if plan.export_dir is not None:
        needed = export_bytes(plan.table, plan.recipe.export.dtype)
        problems += check_export_target(Path(plan.export_dir), "export.path", needed)
    return problems


def _room_problems(plan: Plan, folder: RunFolder) -> list[Problem]:
    """Too little room for the checkpoints: the ones kept, and the one being written beside them."""
    kept = plan.recipe.save.keep_last
    rows = stored_rows(plan.table)
    one = len(PARTS) * sum(row.num_elements * DTYPE_BYTES[row.storage_dtype] for row in rows)
    existing = next(p for p in [folder.root.absolute(), *folder.root.absolute().parents] if p.exists())
    free, needed = shutil.disk_usage(existing).free, (kept + 1) * one
    if needed <= free:
        return []
    rule = f"must lie on a disk with room for {kept + 1} checkpoints of {one / 1e9:.3g} GB"
    fix = "another disk" + (f", or save.keep_last={max(free // one - 1, 1)}" if free >= 2 * one else "")
    return [Problem("output_dir", folder.root, rule, f"free: {free / 1e9:.3g} GB", fix)]
