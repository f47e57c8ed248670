"""New weights on eight devices: the host's numbers bit for bit, made where they stay by one program."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch_xla.debug import metrics

from tests import small
from tests.new_weights import assert_new, source
from tptrain.backends.xla.backend import XlaBackend
from tptrain.config.state_parts import PARAMS
from tptrain.jaxside.random_init import RandomSource
from tptrain.train.state import fresh_state, parts_of

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)

# With fsdp=4 a device has rows of 30 numbers: a loop over them is vectorised and has a rest.
CASES: dict[str, dict[str, Any]] = {
    "8x1": {"fsdp": 8},
    "4x2": {"fsdp": 4, "tensor": 2},
    "1x8 tied": {"tensor": 8, "config": small.LLAMA3_TIED},
    "2x2x2 tied": {"fsdp": 2, "tensor": 2, "data": 2, "config": small.LLAMA3_TIED},
    "adafactor": {"fsdp": 2, "tensor": 4, "optim": {"name": "adafactor", "momentum": 0.0}},
    "frozen": {"fsdp": 4, "tensor": 2, "trainable": ("model.layers.*.self_attn.*", "lm_head.weight")},
    "adapters": {"fsdp": 4, "tensor": 2, "lora": {"rank": 3}},
    "frozen layers": {"fsdp": 2, "tensor": 4, "trainable": ("model.layers.1.*",)},
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_the_numbers_of_the_host(case: str) -> None:
    plan = small.small_plan(**CASES[case])
    backend = XlaBackend(plan, PERMUTED)
    assert_new(backend, plan, fresh_state(backend, source()))


def test_one_program_makes_the_state_and_takes_the_seed_as_an_argument() -> None:
    plan = small.small_plan(1, 4, data=2)
    backend = XlaBackend(plan, tuple(range(8)))
    before = backend.compile_count()
    first = fresh_state(backend, RandomSource(1, 0.02))
    backend.sync()
    assert backend.compile_count() == before + 1
    second = fresh_state(backend, RandomSource(2, 0.02))
    one, two = (small.whole_rows(backend, plan, parts_of(s)[PARAMS]) for s in (first, second))
    assert backend.compile_count() == before + 1
    name = "model.layers.1.mlp.down_proj.weight"
    assert (one[name] != two[name]).float().mean() > 0.99


def bytes_to_devices() -> int:
    """That torch_xla has handed to the runtime so far."""
    data = metrics.metric_data("OutboundData")
    return int(data[1]) if data else 0


def test_the_host_sends_keys_and_no_weights() -> None:
    plan = small.small_plan(4, 2)
    backend = XlaBackend(plan, PERMUTED)
    start = bytes_to_devices()
    state = fresh_state(backend, source())
    backend.sync()
    created = bytes_to_devices() - start
    assert 0 < created <= 10_000, "eight bytes a row on each device, and a flag"
    backend.place(small.DictSource(small.weights_of(small.reference())))
    backend.sync()
    sent = bytes_to_devices() - start - created
    weights = sum(math.prod(tensor.shape) * 4 for tensor in parts_of(state)[PARAMS].values())
    assert sent >= weights, "what is not sent must be what would be counted"
