"""What happens between two steps: the evaluation, the save, and the end that a SIGTERM asks for."""

from __future__ import annotations

import time

from tptrain.backends.base import Tensors
from tptrain.ckpt.policies import SavePolicy
from tptrain.ckpt.steps import BEST_METRIC
from tptrain.eval.exact_match import Score
from tptrain.train.journal import StepRecord
from tptrain.train.loop import Progress
from tptrain.train.preemption import Preemption
from tptrain.train.saving import Saver
from tptrain.train.scoring import Scoring


class AfterStep:
    """Scores and saves the steps that are due, and the last one.

    A step that is both is scored first, so that its checkpoint carries the score.

    last_score: of the newest step that was scored; None before.
    """

    def __init__(
        self,
        total_steps: int,
        policy: SavePolicy,
        saver: Saver,
        scoring: Scoring | None,
        score_every: int,
        preemption: Preemption,
    ):
        """scoring: None for a run without evaluation. score_every: steps; 0: the last one only."""
        self._total, self._policy, self._saver = total_steps, policy, saver
        self._scoring, self._score_every, self._preemption = scoring, score_every, preemption
        self._saved_at = time.monotonic()
        self._loss = 0.0
        self.last_score: Score | None = None

    def see(self, record: StepRecord) -> None:
        """An observer: the loss of a step goes into the metrics of its checkpoint."""
        self._loss = record.loss

    def due(self, step: int) -> bool:
        """Whether anything follows this step, which is done or under way."""
        return self._is_scored(step) or self._is_saved(step) or not self._preemption.begin(step + 1)

    def __call__(self, state: Tensors, progress: Progress) -> bool:
        """Score and save the step if that is due; whether the run ends with it, being saved."""
        step, last = progress.step, progress.step == self._total
        saves = self._is_saved(step)
        metrics = self._score(state, step) if self._is_scored(step) else {}
        if saves:
            self._save(state, progress, metrics)
        if not last and self._preemption.begin(step + 1):
            return False
        if not saves:
            self._save(state, progress, metrics)
        self._saver.wait()
        return True

    def _is_scored(self, step: int) -> bool:
        if self._scoring is None:
            return False
        return step == self._total or (self._score_every > 0 and step % self._score_every == 0)

    def _is_saved(self, step: int) -> bool:
        return step == self._total or self._policy.due(step, time.monotonic() - self._saved_at)

    def _save(self, state: Tensors, progress: Progress, metrics: dict[str, float]) -> None:
        self._saver.save(state, progress, metrics)
        self._saved_at = time.monotonic()

    def _score(self, state: Tensors, step: int) -> dict[str, float]:
        assert self._scoring is not None
        self._preemption.doing("the evaluation of step")
        when = "after training" if step == self._total else f"after step {step}"
        self.last_score = self._scoring(state, step, when)
        self._preemption.doing("step")
        return {BEST_METRIC: self.last_score.rate, "loss": self._loss}
