"""Guards: which steps are skipped, and when too much is wrong for the run to go on.

What a step does with its numbers is decided on the devices, by comparing them with a limit that it is given;
this is the host's side: the limits, from the norms of earlier steps, and the counts. The limit of step n
knows the norms of steps up to n - 2, whether numbers are read at once or one step late, so that both train
alike. All of it is part of a checkpoint, so that a run that goes on decides as one that was never stopped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

from tptrain.config.plan import Plan
from tptrain.errors import TptrainError

# The item of a checkpoint's `run` that holds their state.
GUARDS = "guards"

NON_FINITE, SPIKE = "non_finite", "spike"


class GuardError(TptrainError):
    """A guard stopped the run. The update was not applied, nor any after it.

    step: the step that it stopped at. reason: non_finite, spike, or too_many_skipped.
    """

    reason = "too_many_skipped"

    def __init__(self, step: int, message: str):
        super().__init__(f"step {step}: {message}")
        self.step = step


class NonFiniteError(GuardError):
    """A loss or gradient norm was not finite."""

    reason = NON_FINITE


class SpikeError(GuardError):
    """A gradient norm was far above those before."""

    reason = SPIKE


class Guards:
    """The guards of one run, from wherever it stands.

    skipped: reason -> steps that were skipped, over all processes of the run.
    """

    def __init__(self, plan: Plan, saved: Mapping[str, Any] | None = None):
        """saved: from `saved` of the step that a run goes on from; None for a new run."""
        self._section, self._rate = plan.recipe.guards, plan.recipe.optim.learning_rate
        saved = saved or {}
        self._norms: list[tuple[int, float]] = [(int(s), float(n)) for s, n in saved.get("norms", [])]
        self._in_a_row = int(saved.get("in_a_row", 0))
        self.skipped = Counter(
            {str(reason): int(count) for reason, count in saved.get("skipped", {}).items()}
        )

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON data: recent finite norms with their steps, and the counts."""
        norms = [[step, norm] for step, norm in self._norms]
        return {"norms": norms, "in_a_row": self._in_a_row, "skipped": dict(sorted(self.skipped.items()))}

    def norm_limit(self, step: int) -> float:
        """The gradient norm above which a step is a spike; infinity while no norm is one."""
        section = self._section
        known = [norm for before, norm in self._norms if before <= step - 2][-section.window :]
        if not section.spike_factor or len(known) < section.window:
            return math.inf
        # Of gradients that have all been 0 nothing can be said.
        return section.spike_factor * median(known) or math.inf

    def judge(self, step: int, outputs: Mapping[str, float]) -> str:
        """Why a step was skipped, "" for one that was not. outputs: of the step.

        Raises NonFiniteError or SpikeError where that stops the run.
        """
        reason = "" if outputs["finite"] else NON_FINITE
        if outputs["spike"]:
            reason = SPIKE
        if reason == NON_FINITE and self._section.non_finite == "stop":
            raise NonFiniteError(step, self._non_finite(outputs))
        if reason == SPIKE and self._section.spike == "stop":
            raise SpikeError(step, self._spike(step, outputs))
        if math.isfinite(outputs["grad_norm"]):
            # One more than the window, for the step just before does not count yet.
            self._norms = [*self._norms, (step, outputs["grad_norm"])][-self._section.window - 1 :]
        self._in_a_row = self._in_a_row + 1 if reason else 0
        if reason:
            self.skipped[reason] += 1
        return reason

    def raise_if_too_many(self, step: int) -> None:
        """Raise GuardError where more steps have been skipped than the recipe allows. step: judged last."""
        section, total = self._section, self.skipped.total()
        for count, setting, how in (
            (self._in_a_row, "max_in_a_row", "one after the other"),
            (total, "max_skipped", "in all"),
        ):
            allowed = getattr(section, setting)
            if count > allowed:
                by_reason = ", ".join(f"{number} {reason}" for reason, number in sorted(self.skipped.items()))
                raise GuardError(
                    step,
                    f"{count} steps were skipped {how} (guards.{setting}={allowed}; of the whole run "
                    f"{by_reason}), so the run stopped; the last checkpoint is untouched. {self._advice()}",
                )

    def _non_finite(self, outputs: Mapping[str, float]) -> str:
        what = "gradient norm" if math.isfinite(outputs["loss"]) else "loss"
        value = outputs["grad_norm"] if what == "gradient norm" else outputs["loss"]
        return (
            f"the {what} is {value}, so its update was not applied and the run stopped; "
            f"the last checkpoint is untouched. {self._advice()}"
        )

    def _spike(self, step: int, outputs: Mapping[str, float]) -> str:
        factor = self._section.spike_factor
        usual = self.norm_limit(step) / factor
        return (
            f"the gradient norm is {outputs['grad_norm']:.4g}, above guards.spike_factor={factor:g} times "
            f"{usual:.4g}, the median of {self._section.window} norms before, so its update was not applied "
            f"and the run stopped; the last checkpoint is untouched. {self._advice()}"
        )

    def _advice(self) -> str:
        return (
            f"Try optim.learning_rate={self._rate / 10:g} (now {self._rate:g}), "
            "a longer schedule.warmup_steps, or look at the records of that step"
        )
