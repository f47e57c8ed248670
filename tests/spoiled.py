"""Batches of chosen steps, spoiled by their weights: a loss that is NaN, or enormous gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tptrain.data.batches import Batch, Batches


def not_a_number(batch: Batch) -> Batch:
    """One target weighs NaN, and so does the loss."""
    weights = batch.weights.copy()
    weights[0, 0, 0] = np.nan
    return replace(batch, weights=weights)


def enormous(batch: Batch) -> Batch:
    """Weights of both signs that cancel: what they are divided by is 1, and so their gradients are huge."""
    signs = np.where(np.arange(batch.weights.shape[-1]) % 2, 1.0, -1.0)
    return replace(batch, weights=(batch.weights * signs * 50).astype(np.float32))


def spoil(monkeypatch: Any, steps: Mapping[int, Any]) -> None:
    """Have the batches of these steps spoiled in every run. steps: number -> one of the functions above."""
    batch_at = Batches.batch_at

    def spoiled(self: Batches, cursor: int) -> Batch:
        batch, step = batch_at(self, cursor), cursor // self.batch_rows + 1
        return steps[step](batch) if step in steps else batch

    monkeypatch.setattr(Batches, "batch_at", spoiled)
