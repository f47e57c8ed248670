"""How many checkpoints a run keeps at a time."""

from __future__ import annotations

import math

from tptrain.config.plan import Plan


def most_kept(plan: Plan) -> int:
    """How many steps the recipe may keep at a time, as far as the length of the run is known from it."""
    save, max_steps = plan.recipe.save, plan.recipe.schedule.max_steps
    kept = save.keep_last + save.keep_best
    if max_steps is None or save.every_seconds:
        return kept
    every = save.every_steps or max_steps
    if save.keep_every:
        kept += max_steps // math.lcm(every, save.keep_every)
    return min(kept, -(-max_steps // every))
