"""The scores of an evaluation: which there are, which a recipe measures, and what it may require of them."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tptrain.config.schema import Recipe

EXACT_MATCH, HELD_OUT_LOSS, TOKEN_ACCURACY = "exact_match", "held_out_loss", "token_accuracy"

# Metric -> whether a higher score is a better one.
HIGHER_IS_BETTER = {EXACT_MATCH: True, HELD_OUT_LOSS: False, TOKEN_ACCURACY: True}

# Metric -> settings that have it measured.
MEASURED_BY = {
    EXACT_MATCH: "eval.problems=200",
    HELD_OUT_LOSS: "data.validation=0.02",
    TOKEN_ACCURACY: "data.validation=0.02",
}

# What a requirement compares with besides a number: the score before training.
BEFORE = "before"

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_REQUIREMENT = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([\w.+-]+)\s*")


def measured_metrics(recipe: Recipe) -> tuple[str, ...]:
    """The metrics that a run of this recipe measures, in the order of HIGHER_IS_BETTER."""
    found = [EXACT_MATCH] if recipe.eval.problems else []
    if recipe.data.validation or recipe.eval.loss_path is not None:
        found += [HELD_OUT_LOSS, TOKEN_ACCURACY]
    return tuple(found)


def best_metric(recipe: Recipe) -> str | None:
    """What makes a checkpoint the best one; None where nothing is measured."""
    asked, measured = recipe.save.best_metric, measured_metrics(recipe)
    if asked != "auto":
        return asked
    return measured[0] if measured else None


def is_better(metric: str, score: float, than: float) -> bool:
    """Whether one score is better than another; one that is no number is never better."""
    if math.isnan(score) or math.isnan(than):
        return math.isnan(than) and not math.isnan(score)
    return score > than if HIGHER_IS_BETTER[metric] else score < than


@dataclass(frozen=True)
class Requirement:
    """One entry of export.require: a metric, a comparison, and a number; None: the score before training."""

    text: str
    metric: str
    comparison: str
    bound: float | None

    def limit(self, before: Mapping[str, float]) -> float:
        """The number to compare with. before: scores before training, the metric among them if asked for."""
        return before[self.metric] if self.bound is None else self.bound

    def holds(self, score: float, before: Mapping[str, float]) -> bool:
        """Whether a score is as required. One that is not a number never is."""
        return bool(_COMPARISONS[self.comparison](score, self.limit(before)))


def parse_requirement(text: str) -> Requirement | None:
    """The requirement that a text such as "exact_match>=before" states; None for a text of another form."""
    match = _REQUIREMENT.fullmatch(text)
    if match is None:
        return None
    metric, comparison, bound = match.groups()
    if bound == BEFORE:
        return Requirement(text, metric, comparison, None)
    try:
        number = float(bound)
    except ValueError:
        return None
    return Requirement(text, metric, comparison, number) if math.isfinite(number) else None


def requirements(recipe: Recipe) -> tuple[Requirement, ...]:
    """Those of a recipe that has passed its checks."""
    parsed = [parse_requirement(text) for text in recipe.export.require or ()]
    assert all(parsed), "a plan has none of another form"
    return tuple(requirement for requirement in parsed if requirement is not None)
