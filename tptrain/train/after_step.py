"""What happens between two steps: the evaluation, the save, and the end that scores or a SIGTERM ask for."""

from __future__ import annotations

import time

from tptrain.backends.base import Tensors
from tptrain.ckpt.policies import SavePolicy
from tptrain.train.best_so_far import BestSoFar
from tptrain.train.journal import StepRecord
from tptrain.train.loop import Progress
from tptrain.train.preemption import Preemption
from tptrain.train.saving import Saver
from tptrain.train.scoring import Scores, Scoring


class AfterStep:
    """Scores and saves the steps that are due, and the last one.

    A step that is both is scored first, so that its checkpoint carries the score.

    last_scores: of the newest step that was scored; None before.
    stopped_at:  the step after which the scores have ended the run; None while they have not.
    """

    def __init__(
        self,
        total_steps: int,
        policy: SavePolicy,
        saver: Saver,
        scoring: Scoring | None,
        score_every: int,
        preemption: Preemption,
        best: BestSoFar,
    ):
        """scoring: None for a run without evaluation. score_every: steps; 0: the last one only.

        best: is told every score, and says when they end the run.
        """
        self._total, self._policy, self._saver = total_steps, policy, saver
        self._scoring, self._score_every, self._preemption = scoring, score_every, preemption
        self._best = best
        self._saved_at = time.monotonic()
        self._loss = 0.0
        self.last_scores: Scores | None = None
        self.stopped_at: int | None = None

    def see(self, record: StepRecord) -> None:
        """An observer: the loss of a step goes into the metrics of its checkpoint; of one that was skipped,
        that of the step before."""
        if not record.skipped:
            self._loss = record.loss

    def due(self, step: int) -> bool:
        """Whether anything follows this step, which is done or under way."""
        return self._is_scored(step) or self._is_saved(step) or not self._preemption.begin(step + 1)

    def __call__(self, state: Tensors, progress: Progress) -> bool:
        """Score and save the step if that is due; whether the run ends with it, being saved."""
        step = progress.step
        metrics = self._score(state, step) if self._is_scored(step) else {}
        last = step == self._total or self.stopped_at == step
        saves = last or self._is_saved(step)
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
        self.last_scores = self._scoring(state, step, when)
        self._preemption.doing("step")
        self._best.see(step, self.last_scores.metrics)
        if self._best.ends_the_run and step < self._total:
            self.stopped_at = step
        return {**self.last_scores.metrics, "loss": self._loss}
