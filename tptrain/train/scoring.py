"""Scoring a step on the held-out problems, told on the console and in the journal."""

from __future__ import annotations

import time

from rich.console import Console

from tptrain.backends.base import Tensors
from tptrain.ckpt.steps import BEST_METRIC
from tptrain.eval.exact_match import ExactMatch, Score
from tptrain.train.journal import Journal
from tptrain.train.state import part_of


class Scoring:
    """Answers the same problems whenever it is called."""

    def __init__(self, scorer: ExactMatch, console: Console, journal: Journal):
        self._scorer, self._console, self._journal = scorer, console, journal

    def __call__(self, state: Tensors, step: int, when: str) -> Score:
        """The score of a state; its parameters are left as they are. when: in words, for the console."""
        started = time.perf_counter()
        self._journal.event("begin", "eval", step)
        score = self._scorer(part_of(state, "params"))
        self._journal.event("end", "eval", step, {BEST_METRIC: score.rate})
        seconds = time.perf_counter() - started
        right = f"{score.right} of {len(score.answers)}"
        self._console.print(f"Held-out problems answered right {when}: {right} ({seconds:.0f} s).")
        return score
