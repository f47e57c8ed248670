"""The export at the end of a run: of which step, and whether its scores are what export.require asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tptrain.ckpt.steps import best_step
from tptrain.config.metrics import Requirement, requirements
from tptrain.config.plan import Plan
from tptrain.errors import Problem, TptrainError, refuse
from tptrain.train.folder import RunFolder


class RequirementError(TptrainError):
    """The run is saved, but the scores of the step to export are not what export.require asks for."""


@dataclass(frozen=True)
class Exported:
    """The step that is exported. metrics: its scores; empty where it has none."""

    step: int
    metrics: Mapping[str, float]


def before_problems(plan: Plan, before: Mapping[str, float]) -> list[Problem]:
    """Requirements that a run which goes on cannot judge. before: the scores that it was saved with."""
    rule = "needs the score before training, which a run that goes on no longer has"
    measured = ", ".join(before) or "nothing"
    other = f"measured before training: {measured}"
    asked = requirements(plan.recipe) if plan.export_dir is not None else ()
    return [
        Problem("export.require", r.text, rule, other, f"a number, such as {r.metric}{r.comparison}0.5")
        for r in asked
        if r.bound is None and r.metric not in before
    ]


def chosen_step(plan: Plan, folder: RunFolder, last: int, metrics: Mapping[str, float]) -> Exported:
    """The step that the recipe has exported. metrics: the scores of the last one.

    Raises ProblemsError where the best step is asked for and no step has a score.
    """
    metric = plan.best_metric
    if plan.recipe.export.step == "last" or metric is None:
        return Exported(last, metrics)
    best = best_step(folder.checkpoints, metric)
    if best is None:
        rule, other = (
            "needs a step that was saved with a score",
            f"no step in {folder.checkpoints} has {metric}",
        )
        raise refuse("export.step", "best", rule, other, "last")
    return Exported(best.step, best.metrics)


def check_required(plan: Plan, folder: RunFolder, chosen: Exported, before: Mapping[str, float]) -> None:
    """Raise RequirementError where scores of a step are not as required. before: those before training."""
    failed = [
        f"{r.text}, but {_numbers(r, chosen, before)}"
        for r in requirements(plan.recipe)
        if not r.holds(chosen.metrics.get(r.metric, math.nan), before)
    ]
    if failed:
        raise RequirementError(
            f"step {chosen.step} is saved and not exported, because export.require does not hold: "
            f"{'; '.join(failed)}. To export it all the same: {by_hand(folder.step(chosen.step))}"
        )


def by_hand(step_folder: Path) -> str:
    """The command that exports a step."""
    return f"python tools/convert_ckpt.py {step_folder} FOLDER"


def _numbers(requirement: Requirement, chosen: Exported, before: Mapping[str, float]) -> str:
    """Both sides of a requirement that does not hold, in words."""
    score = chosen.metrics.get(requirement.metric, math.nan)
    text = f"{requirement.metric} is {score:.4g} at step {chosen.step}"
    return f"{text} and was {before[requirement.metric]:.4g} before" if requirement.bound is None else text
