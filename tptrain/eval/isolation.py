"""Whether records that share rows see each other, asked of the very program that scores them.

Attention keeps the records of a row apart by their segments, in kernels that differ from device to device. So
before a run trains on packed rows, the first record of each row is changed and the others are scored again: a
sum of their losses that is another number, be it in its last bit, means that something of their neighbour
reached them. Later records need no such change, for no token sees what comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tptrain.backends.base import Tensors
from tptrain.config.plan import Plan
from tptrain.data.batches import Batch
from tptrain.errors import ProblemsError, refuse
from tptrain.eval.held_out import RowScorer

# Experts work on the tokens of all rows at once, in an order that the changed ones have a part in.
MIXTURE_GAP = 1e-5


@dataclass(frozen=True)
class Isolation:
    """Sums of the losses of all but the first records, before and after these were changed.

    rows: that hold several records. first_before, first_after: of the first ones themselves, which must
    differ, or the change did not reach the model.
    """

    rows: int
    before: float
    after: float
    first_before: float
    first_after: float

    def leak(self, is_mixture: bool) -> bool:
        """Whether records see each other."""
        gap = MIXTURE_GAP * abs(self.before) if is_mixture else 0.0
        return not abs(self.after - self.before) <= gap or self.first_after == self.first_before


def isolation(scorer: RowScorer, params: Tensors, batch: Batch, vocab_size: int) -> Isolation | None:
    """Change the first records of a batch's first micro-batch; None where no row of it holds several.

    params: weights by buffer name, left as they are.
    """
    first = replace(batch, **{name: getattr(batch, name)[:1] for name in _ARRAYS})
    shared = (first.segment_ids > 1).any(axis=-1, keepdims=True)
    if not shared.any():
        return None
    changes = shared & (first.segment_ids == 1)
    tokens = np.where(changes, (first.tokens + 1) % vocab_size, first.tokens).astype(first.tokens.dtype)
    others = replace(first, weights=first.weights * (first.segment_ids > 1))
    themselves = replace(first, weights=first.weights * changes)
    sums = [
        scorer(params, rows).loss_sum
        for rows in (
            *(others, replace(others, tokens=tokens)),
            *(themselves, replace(themselves, tokens=tokens)),
        )
    ]
    return Isolation(int(shared.sum()), *sums)


_ARRAYS = ("tokens", "targets", "weights", "positions", "segment_ids")


def leak_refusal(plan: Plan, found: Isolation) -> ProblemsError:
    """The refusal to train on packed rows."""
    rule = "must keep the records of a row apart"
    if found.first_before == found.first_after:
        other = f"changing a record leaves its own loss at {found.first_before!r}"
    else:
        other = f"changing the first record of {found.rows} rows moves the loss of the others"
        other = f"{other} from {found.before!r} to {found.after!r}"
    fix = "none, or kernels.attention=plain"
    return refuse("data.packing", plan.recipe.data.packing, rule, other, fix)
