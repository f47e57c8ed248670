"""Scoring a state on held-out records, told on the console and in the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tptrain.backends.base import Tensors
from tptrain.config.metrics import EXACT_MATCH, HELD_OUT_LOSS, TOKEN_ACCURACY
from tptrain.eval.exact_match import ExactMatch, Score
from tptrain.eval.held_out import HeldOut
from tptrain.train.journal import Journal
from tptrain.train.state import part_of


@dataclass(frozen=True)
class Scores:
    """What an evaluation gave.

    metrics: score by name of the metric.
    exact:   the answers to the held-out problems; None where none are asked, and for scores read back from
             a checkpoint.
    """

    metrics: Mapping[str, float]
    exact: Score | None = None


class Scoring:
    """Scores the same records whenever it is called. exact, held_out: None for what is not measured."""

    def __init__(
        self,
        exact: ExactMatch | None,
        held_out: HeldOut | None,
        say: Callable[[str], None],
        journal: Journal,
    ):
        self._exact, self._held_out, self._say, self._journal = exact, held_out, say, journal

    def __call__(self, state: Tensors, step: int, when: str) -> Scores:
        """The scores of a state; its parameters are left as they are. when: in words, for the console."""
        params, metrics = part_of(state, "params"), dict[str, float]()
        self._journal.event("begin", "eval", step)
        exact = self._answered(params, when, metrics) if self._exact is not None else None
        if self._held_out is not None:
            self._lost(params, when, metrics)
        self._journal.event("end", "eval", step, metrics)
        return Scores(metrics, exact)

    def _answered(self, params: Tensors, when: str, metrics: dict[str, float]) -> Score:
        assert self._exact is not None
        started = time.perf_counter()
        score = self._exact(params)
        metrics[EXACT_MATCH] = score.rate
        right, seconds = f"{score.right} of {len(score.answers)}", time.perf_counter() - started
        self._say(f"Held-out problems answered right {when}: {right} ({seconds:.0f} s).")
        return score

    def _lost(self, params: Tensors, when: str, metrics: dict[str, float]) -> None:
        assert self._held_out is not None
        started = time.perf_counter()
        score = self._held_out(params)
        metrics[HELD_OUT_LOSS], metrics[TOKEN_ACCURACY] = score.loss, score.token_accuracy
        seconds = time.perf_counter() - started
        self._say(
            f"Held-out loss {when}: {score.loss:.4f}, {score.token_accuracy:.1%} of {score.counted_tokens:,}"
            f" tokens right ({seconds:.0f} s)."
        )
