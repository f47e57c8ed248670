"""Checks of evaluations, of what depends on their scores, and of the guards."""

from __future__ import annotations

import math

from tptrain.config.metrics import (
    HIGHER_IS_BETTER,
    MEASURED_BY,
    best_metric,
    measured_metrics,
    parse_requirement,
)
from tptrain.config.schema import Recipe
from tptrain.errors import Problem, unknown_name

_ANY_METRIC = "data.validation=0.02"


def evaluation_problems(recipe: Recipe) -> list[Problem]:
    """Held-out records missing or named twice, scores that nothing measures, guards that cannot be."""
    return [
        *_records_problems(recipe),
        *_best_metric_problems(recipe),
        *_choosing_problems(recipe),
        *_export_step_problems(recipe),
        *_requirement_problems(recipe),
        *_guards_problems(recipe),
    ]


def _records_problems(recipe: Recipe) -> list[Problem]:
    evaluation, data = recipe.eval, recipe.data
    problems = []
    has_own = evaluation.path is not None or data.path.startswith("builtin:") or data.validation > 0
    if evaluation.problems and data.sources and evaluation.path is None:
        rule = "needs held-out records of its own where there are several sources"
        other, fix = "eval.path=none", "0, or eval.path=FILE with records in the form that data itself names"
        return [Problem("eval.problems", evaluation.problems, rule, other, fix)]
    if evaluation.problems and data.preset == "chat":
        rule, other = "asks for questions with one answer each", "data.preset=chat"
        problems.append(Problem("eval.problems", evaluation.problems, rule, other, "0"))
    elif evaluation.problems and not has_own:
        rule, other = "needs held-out records", "eval.path=none"
        fix = "0, or eval.path=FILE with held-out records, or data.validation=0.02"
        problems.append(Problem("eval.problems", evaluation.problems, rule, other, fix))
    if evaluation.loss_path is not None and data.validation:
        rule = "takes the place of the records that data.validation sets apart: one of the two"
        other, fix = f"data.validation={data.validation:g}", "none, or data.validation=0"
        problems.append(Problem("eval.loss_path", evaluation.loss_path, rule, other, fix))
    return problems


def _best_metric_problems(recipe: Recipe) -> list[Problem]:
    asked, measured = recipe.save.best_metric, measured_metrics(recipe)
    if asked == "auto" or asked in measured:
        return []
    fix = f"auto, or {MEASURED_BY[asked]} beside it"
    return [Problem("save.best_metric", asked, "must be measured", _measured_text(recipe), fix)]


def _measured_text(recipe: Recipe) -> str:
    return f"measured: {', '.join(measured_metrics(recipe)) or 'nothing'}"


def _choosing_problems(recipe: Recipe) -> list[Problem]:
    """What keep_best and patience need: scores during training; keep_best, scored steps that are saved."""
    problems = []
    every = recipe.eval.every_steps
    missing = [(best_metric(recipe) is None, "no evaluation", _ANY_METRIC)]
    missing += [(every == 0, "eval.every_steps=0", "eval.every_steps=100")]
    lacks = [(what, example) for is_missing, what, example in missing if is_missing]
    asked = (
        ("save.keep_best", recipe.save.keep_best, "needs scores to choose by"),
        ("eval.patience", recipe.eval.patience, "needs scores that get no better"),
    )
    for setting, value, rule in asked:
        if value and lacks:
            other = ", ".join(what for what, _ in lacks)
            fix = "0, or " + " and ".join(example for _, example in lacks)
            problems.append(Problem(setting, value, rule, other, fix))
    return problems if lacks else [*problems, *meeting_problems(recipe, recipe.schedule.max_steps)]


def meeting_problems(recipe: Recipe, total_steps: int | None) -> list[Problem]:
    """Scored steps that are never saved ones, which leaves save.keep_best nothing to choose from.

    total_steps: length of the run, None while it is not known.
    """
    saves, scores = recipe.save.every_steps, recipe.eval.every_steps
    if not recipe.save.keep_best:
        return []
    rule = "must be met by saves, or save.keep_best has no steps to choose from"
    if saves == 0:
        return [Problem("eval.every_steps", scores, rule, "save.every_steps=0", f"save.every_steps={scores}")]
    first = math.lcm(saves, scores)
    if total_steps is None or first <= total_steps:
        return []
    other = f"save.every_steps={saves}: first step of both {first}, last step {total_steps}"
    fix = f"{saves}" if saves <= total_steps else f"{max(total_steps // 2, 1)} for both"
    return [Problem("eval.every_steps", scores, rule, other, fix)]


def _export_step_problems(recipe: Recipe) -> list[Problem]:
    export = recipe.export
    if export.step == "last" or not export.enabled or recipe.save.keep_best:
        return []
    rule, other = "needs the best checkpoint to be kept", "save.keep_best=0"
    fix = "last, or save.keep_best=1 beside it"
    return [Problem("export.step", export.step, rule, other, fix)]


def _requirement_problems(recipe: Recipe) -> list[Problem]:
    problems, measured = [], measured_metrics(recipe)
    for text in recipe.export.require or ():
        found = parse_requirement(text)
        if found is None:
            rule = "must be a metric, one of >=, <=, > and <, and a number or before"
            other = f"metrics: {', '.join(HIGHER_IS_BETTER)}"
            problems.append(Problem("export.require", text, rule, other, "such as exact_match>=before"))
        elif found.metric not in HIGHER_IS_BETTER:
            problems.append(unknown_name("export.require", found.metric, "metric", HIGHER_IS_BETTER))
        elif found.metric not in measured and recipe.export.enabled:
            rule, fix = "needs its metric to be measured", f"none, or {MEASURED_BY[found.metric]} beside it"
            problems.append(Problem("export.require", text, rule, _measured_text(recipe), fix))
    return problems


def _guards_problems(recipe: Recipe) -> list[Problem]:
    factor = recipe.guards.spike_factor
    if factor == 0 or factor > 1:
        return []
    rule = "must be above 1, or half of all steps would be spikes"
    other = "it multiplies the median of the norms before"
    return [Problem("guards.spike_factor", factor, rule, other, "0, or a number such as 5")]
