"""What a new state has to be, row by row: the numbers of the host, zeros in the padding, zeros elsewhere."""

from __future__ import annotations

import torch

from tests import small
from tptrain.backends.base import TORCH_DTYPES, Backend, Tensors
from tptrain.config import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.jaxside.random_init import RandomSource
from tptrain.train.state import parts_of

SEED, STD = 3, 0.05


def source() -> RandomSource:
    return RandomSource(SEED, STD)


def assert_new(backend: Backend, plan: Plan, state: Tensors) -> None:
    """Bit for bit, so a number is the same on any mesh."""
    parts, host = parts_of(state), source()
    assert set(parts) == set(plan.parts)
    for name, part in plan.parts.items():
        held = small.whole_rows(backend, plan, parts[name], name)
        assert set(held) == {row.name for row in part.rows}
        for row in part.rows:
            dtype = TORCH_DTYPES[row.storage_dtype]
            expected = torch.zeros(row.padded_size, dtype=dtype)
            if name == PARAMS:
                whole = tuple(slice(0, n) for n in row.size)
                expected[whole] = host.read(row, whole).to(dtype)
            assert held[row.name].dtype == dtype
            assert torch.equal(held[row.name], expected), (name, row.name)
