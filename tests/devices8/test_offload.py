"""Policies that offload: the same values as without, and moves to the host exactly where they belong."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
import torch_xla

from tests import small
from tests.devices8.test_model_sharded import PERMUTED, gradients_of
from tptrain.backends.base import Tensors
from tptrain.backends.xla.backend import XlaBackend
from tptrain.train.state import fresh_state, split_frozen
from tptrain.train.step import prepare_step

# Policy -> the one that keeps the same on the device.
WITHOUT = {"offload": "full", "offload_attention": "attention"}
_MOVE = re.compile(r'^  %?(\S+) = \S+ custom-call\((?:\S+ )?%?([^\s,)]+)\), custom_call_target="Move(\w+)"')
_NAME = re.compile(r"%?\b[a-zA-Z_][\w-]*\.\d+\b")


@cache
def program(remat: str, topology: str) -> str:
    """Loss and gradients as traced for a topology, plain attention; nothing is compiled."""
    plan = small.small_plan(4, 2, topology=topology, remat=remat, attention="plain")
    backend = XlaBackend(plan, PERMUTED)
    loss, gradients = gradients_of(backend, plan, small.weights_of(small.reference(False)))
    return torch_xla._XLAC._get_xla_tensors_hlo([loss, *gradients.values()])


@cache
def values(remat: str) -> tuple[float, Tensors]:
    """Loss and gradients by row name on eight devices."""
    plan = small.small_plan(4, 2, remat=remat)
    backend = XlaBackend(plan, PERMUTED)
    loss, gradients = gradients_of(backend, plan, small.weights_of(small.reference(False)))
    for name, gradient in gradients.items():
        backend.mesh.mark(gradient, backend.layout.buffers[name].spec)
    torch_xla.sync()
    return loss.item(), small.whole_rows(backend, plan, gradients)


@pytest.mark.parametrize("remat", WITHOUT)
def test_loss_and_gradients_equal_those_without_offloading_bit_for_bit(remat: str) -> None:
    (loss, ours), (expected_loss, expected) = values(remat), values(WITHOUT[remat])
    assert loss == expected_loss
    assert set(ours) == set(expected)
    for name, theirs in expected.items():
        assert theirs.any() and torch.equal(ours[name], theirs), name


def moves(program: str) -> list[str]:
    return sorted(found[3] for line in program.splitlines() if (found := _MOVE.match(line)))


@pytest.mark.parametrize(("remat", "stacks"), [("full", 0), ("offload", 1), ("offload_attention", 2)])
def test_each_stack_is_moved_out_and_back_once(remat: str, stacks: int) -> None:
    """A scan's body is in the program once. Plain attention has no logsumexp."""
    assert moves(program(remat, "v5e-8")) == ["ToDevice"] * stacks + ["ToHost"] * stacks


def test_frozen_layers_at_the_bottom_move_nothing() -> None:
    """Of three runs of layers the backward pass goes through the upper two, each with a stack of inputs."""
    plan = small.small_plan(
        4, 2, topology="v5e-8", remat="offload", attention="plain", trainable=("model.layers.1.*",)
    )
    backend = XlaBackend(plan, PERMUTED)
    function, constants = prepare_step(backend, plan)
    source = small.DictSource(small.weights_of(small.reference(False)))
    state, frozen = split_frozen(fresh_state(backend, source), backend.layout)
    new, outputs = function(state, small.step_inputs(backend, plan, {**constants, **frozen}, 1))
    text = torch_xla._XLAC._get_xla_tensors_hlo([*new.values(), *outputs.values()])
    assert moves(text) == ["ToDevice"] * 2 + ["ToHost"] * 2


@pytest.mark.parametrize("remat", WITHOUT)
def test_virtual_devices_are_asked_for_no_move(remat: str) -> None:
    assert "Move" not in program(remat, "cpu-8")
    assert numbered(program(remat, "cpu-8")) == numbered(program(WITHOUT[remat], "cpu-8"))


def numbered(program: str) -> list[str]:
    """Instructions with their names replaced by numbers in order of appearance; moves are left out."""
    lines, sources = [], {}
    for line in program.splitlines():
        if found := _MOVE.match(line):
            sources[found[1]] = found[2]
        else:
            lines.append(line)
    numbers: dict[str, str] = {}

    def number(name: re.Match[str]) -> str:
        bare = name[0].removeprefix("%")
        while bare in sources:
            bare = sources[bare]
        return numbers.setdefault(bare, f"%{len(numbers)}")

    return [_NAME.sub(number, line.split(", metadata=")[0]) for line in lines]


@pytest.mark.parametrize("remat", WITHOUT)
def test_nothing_but_the_moves_is_added(remat: str) -> None:
    """With each move replaced by its operand it is the program without: the same values are kept and read."""
    ours, theirs = numbered(program(remat, "v5e-8")), numbered(program(WITHOUT[remat], "v5e-8"))
    assert len(theirs) > 500 and ours == theirs
