"""The program that makes new weights: each device computes its own pieces and asks no other for anything."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from jax._src.lib import xla_client

from tests import small
from tests.traced.dumped import module_of
from tptrain.backends.xla.backend import XlaBackend
from tptrain.jaxside.random_init import RandomSource
from tptrain.train.state import fresh_state

COMMUNICATION = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter|send|recv)\b")


def compiled_texts(dump: Path, backend: XlaBackend) -> list[str]:
    """The programs, after optimizations, that a new state takes."""
    before = set(dump.iterdir())
    fresh_state(backend, RandomSource(0, 0.02))
    backend.sync()
    made = [path for path in set(dump.iterdir()) - before if "after_optimizations.hlo.pb" in path.name]
    load: Any = xla_client._xla.HloModule.from_serialized_hlo_module_proto
    return [load(module_of(path.read_bytes())).to_string() for path in made]


@pytest.mark.parametrize("mesh", [(8, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_no_array_is_larger_than_a_piece_and_none_travels(mesh: tuple[int, int, int], dump: Path) -> None:
    backend = XlaBackend(small.small_plan(*mesh), (6, 2, 7, 3, 4, 0, 5, 1))
    (text,) = compiled_texts(dump, backend)
    assert not COMMUNICATION.findall(text)
    found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    largest = max(math.prod(int(size) for size in dims.split(",")) for dims in found)
    buffers = backend.layout.buffers.values()
    sizes = backend.mesh.axis_sizes
    pieces = [
        math.prod(buffer.shape) // math.prod(sizes[axis] for axes in buffer.spec for axis in axes)
        for buffer in buffers
    ]
    assert largest == max(pieces)
