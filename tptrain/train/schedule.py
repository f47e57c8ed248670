"""The numbers that change with the step, as pure functions of it."""

from __future__ import annotations

import math

from tptrain.config.schema import OptimSection, ScheduleSection
from tptrain.train.optimizers import OPTIMIZERS

# A gradient norm above it makes a step a spike; infinity: none is.
NORM_LIMIT = "norm_limit"


def learning_rate(step: int, total_steps: int, schedule: ScheduleSection, optim: OptimSection) -> float:
    """The rate used by step `step`, counted from 1 to total_steps.

    Warm-up rises linearly and reaches the peak at step `warmup_steps`; the decay reaches
    `final_ratio` x peak at step `total_steps`.
    """
    peak = optim.learning_rate
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    decay_steps = max(total_steps - schedule.warmup_steps, 1)
    progress = min((step - schedule.warmup_steps) / decay_steps, 1.0)
    shape = 1 - progress if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * shape)


def step_scalars(
    step: int, total_steps: int, schedule: ScheduleSection, optim: OptimSection, norm_limit: float = math.inf
) -> dict[str, float]:
    """The numbers that change with the step (from 1); they are inputs of the compiled step.

    norm_limit: of `Guards.norm_limit`.
    """
    rate = learning_rate(step, total_steps, schedule, optim)
    return {"learning_rate": rate, NORM_LIMIT: norm_limit, **OPTIMIZERS[optim.name].scalars(step, optim)}
