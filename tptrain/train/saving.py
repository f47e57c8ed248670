"""When a run saves, what it keeps, what goes into a step beside the state, and what a failed save means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from tptrain.backends.base import Tensors
from tptrain.ckpt.base_model import BaseModel
from tptrain.ckpt.checkpointer import Checkpointer, SaveError
from tptrain.ckpt.policies import (
    AnyOf,
    EverySeconds,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepPolicy,
    SavePolicy,
)
from tptrain.config.metrics import HIGHER_IS_BETTER
from tptrain.config.plan import Plan
from tptrain.report.plan_page import plan_json
from tptrain.train.loop import Progress
from tptrain.train.state import parts_of

_VERSIONED = ("tptrain", "torch", "torch_xla", "jax", "orbax-checkpoint", "transformers")


def save_policy(plan: Plan) -> SavePolicy:
    """When the recipe has a step saved, its last one aside."""
    section = plan.recipe.save
    policies: list[SavePolicy] = []
    if section.every_steps:
        policies.append(EverySteps(section.every_steps))
    if section.every_seconds:
        policies.append(EverySeconds(section.every_seconds))
    return AnyOf(tuple(policies))


def keep_policies(plan: Plan) -> list[KeepPolicy]:
    """Which steps the recipe keeps."""
    section = plan.recipe.save
    policies: list[KeepPolicy] = [KeepLast(section.keep_last)]
    if section.keep_every:
        policies.append(KeepEvery(section.keep_every))
    if section.keep_best:
        assert plan.best_metric is not None, "a plan that keeps the best has scores"
        policies.append(KeepBest(section.keep_best, plan.best_metric, HIGHER_IS_BETTER[plan.best_metric]))
    return policies


def run_item(plan: Plan, data_digest: str, base: BaseModel | None = None) -> dict[str, Any]:
    """The part of the `run` item that all steps of a run share.

    Each step adds its number, its cursor, the evaluation so far and what the guards have seen.

    base: the model below the plan's adapters, None without adapters.
    """
    below = {"base": base.as_json()} if base else {}
    return {
        **below,
        "seeds": {"init": plan.recipe.seed, "data": plan.recipe.data.seed},
        "data_digest": data_digest,
        "recipe": plan_json(plan)["recipe"],
        "mesh": plan.mesh.axis_sizes,
        "hf_config": dict(plan.hf_config),
        "best_metric": plan.best_metric,
        "versions": {name: version(name) for name in _VERSIONED},
    }


class Saver:
    """Saves a run's state. A save that fails in the middle of a run is told, and the next one tried."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        shared: Mapping[str, Any],
        say: Callable[[str], None],
        live: Callable[[], Mapping[str, Any]] = dict,
    ):
        """shared: from `run_item`. live: what else the item has, as it is when a step is saved."""
        self._checkpointer, self._shared, self._say, self._live = checkpointer, shared, say, live
        self._failed: SaveError | None = None

    def save(self, state: Tensors, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Start saving a step; it is written in the background, which tells by itself when that fails.

        metrics: of the step; one that is not finite is no score.
        """
        metrics = {name: score for name, score in metrics.items() if math.isfinite(score)}
        run = {**self._shared, **self._live(), "step": progress.step, "cursor": progress.cursor}
        self._failed = None
        try:
            self._checkpointer.save(progress.step, parts_of(state), run, metrics)
        except SaveError as error:
            self._failed = error
            self._say(str(error))

    def wait(self) -> None:
        """Return when the step given to `save` is published; raise SaveError if it could not be saved."""
        if self._failed is not None:
            raise self._failed
        self._checkpointer.wait()
