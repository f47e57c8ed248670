"""Rows for tests of held-out scores, in numbers that fill no batch of 8, 5 or 2."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from tests import small
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.render import Rendered

PAD = 7
LENGTHS = (9, 31, 4, 17, 2, 25, 12, 6, 30, 8, 19, 3, small.TOKENS)


@cache
def dataset() -> TokenizedDataset:
    """Random rows of which about half of the tokens count, the first token of none."""
    random = np.random.default_rng(5)
    rows = []
    for length in LENGTHS:
        mask = random.random(length) < 0.5
        mask[0], mask[-1] = False, True
        rows.append(Rendered(random.integers(0, small.VOCAB, length, dtype=np.int32), mask))
    return TokenizedDataset.of(rows, PAD)


@cache
def likely_dataset() -> TokenizedDataset:
    """Rows whose every other token is the one that the reference model finds likeliest there.

    Of random rows the accuracy of a random model is near 0, which compares little.
    """
    model, random = small.reference(), np.random.default_rng(3)
    rows = []
    for length in LENGTHS:
        ids = random.integers(0, small.VOCAB, length, dtype=np.int32)
        for place in range(1, length, 2):
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(ids[None, :place].astype(np.int64))).logits
            ids[place] = int(logits[0, -1].argmax())
        rows.append(Rendered(ids, np.arange(length) > 0))
    return TokenizedDataset.of(rows, PAD)
