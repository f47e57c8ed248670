"""The best score of a run so far, and for how many evaluations there was no better one: the early stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tptrain.config.metrics import is_better
from tptrain.config.plan import Plan

# The item of a checkpoint's `run` that holds it.
EVALUATION = "evaluation"


class BestSoFar:
    """Follows one metric of a run, from wherever it stands.

    before: the scores before training, by metric; empty where there were none.
    step:   of the best score; None before the first one. since: evaluations after that one.
    """

    def __init__(self, plan: Plan, run: Mapping[str, Any] | None = None):
        """run: the `run` item of the step that a run goes on from; None for a new run.

        Where another metric decides now than did then, its best score is yet to come.
        """
        saved = (run or {}).get(EVALUATION, {})
        self._metric, self._patience = plan.best_metric, plan.recipe.eval.patience
        self.before: dict[str, float] = {str(n): float(v) for n, v in saved.get("before", {}).items()}
        follows = self._metric is not None and saved.get("metric") == self._metric
        self.score: float = float(saved["score"]) if follows and saved["step"] is not None else math.nan
        self.step: int | None = saved["step"] if follows else None
        self.since: int = saved["since"] if follows else 0

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON data."""
        found = {"metric": self._metric, "score": self.score, "step": self.step, "since": self.since}
        return {**found, "score": None if self.step is None else self.score, "before": self.before}

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """The scores of a step; 0 for those before training."""
        if step == 0:
            self.before = {name: score for name, score in metrics.items() if math.isfinite(score)}
        if self._metric is None:
            return
        score = metrics[self._metric] if math.isfinite(metrics[self._metric]) else math.nan
        if is_better(self._metric, score, self.score):
            self.score, self.step, self.since = score, step, 0
        else:
            self.since += 1

    @property
    def ends_the_run(self) -> bool:
        """Whether the last `eval.patience` evaluations have all been no better than one before them."""
        return 0 < self._patience <= self.since

    def reason(self) -> str:
        """Why the run ends, in words."""
        best = f"the best was {self.score:.4g} at step {self.step}"
        if self.step is None:
            best = "none was a finite number"
        evaluations = f"{self.since} evaluations (eval.patience={self._patience})"
        return f"{self._metric} got no better in {evaluations}; {best}"
