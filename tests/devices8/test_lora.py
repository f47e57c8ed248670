"""Adapters over eight devices: equal to the torch backend, the base untouched, saved and restored alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import adapters, families, small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.ckpt.reading import read_tree
from tptrain.config import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.train.start import model_weights
from tptrain.train.state import (
    fresh_state,
    join_parts,
    joined_weights,
    not_halted,
    parts_of,
    split_frozen,
    state_specs,
)
from tptrain.train.step import make_train_step

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
LORA: dict[str, Any] = {"rank": 3, "alpha": 7.0}

# Mesh (fsdp, tensor, data) and settings of a plan.
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "all": ((4, 2, 1), {"lora": LORA, "remat": "full"}),
    "all, nothing again": ((2, 2, 2), {"lora": LORA, "remat": "none", "accumulation": 2}),
    "of the upper layers": (
        (1, 8, 1),
        {"lora": {**LORA, "targets": ("model.layers.[12].self_attn.*", "down_proj")}, "remat": "dots"},
    ),
    "attention of a mixture": (
        (2, 2, 1),
        {
            "lora": {**LORA, "targets": ("heads", "kv_heads")},
            "config": families.CONFIGS["mixtral"],
            "expert": 2,
        },
    ),
    "last layer": (
        (8, 1, 1),
        {
            "lora": {**LORA, "targets": ("model.layers.2.*",)},
            "remat": "attention",
            "optim": {"name": "adafactor"},
        },
    ),
}


@dataclass
class Run:
    """Some steps of a plan. state: after the last one, the base included."""

    plan: Plan
    backend: Any
    state: Tensors
    losses: list[float]
    compiles: int


def base_of(plan: Plan) -> Any:
    """transformers' model of a plan, with random weights."""
    return small.reference_model(plan.hf_config)


def source(plan: Plan) -> small.DictSource:
    return adapters.weights_of(base_of(plan), plan, adapters.random_adapters(plan))


def steps_of(backend: Any, plan: Plan) -> Run:
    decoder = backend.decoder()
    moving, frozen = split_frozen(fresh_state(backend, source(plan)), backend.layout)
    constants = {n: backend.put_constant(t) for n, t in decoder.constants().items()} | frozen
    before = backend.compile_count()
    function = make_train_step(decoder, backend.layout, plan.recipe)
    inputs = small.step_inputs(backend, plan, constants, 1)
    step, losses = backend.compile_step(function, moving, inputs, state_specs(backend)), []
    for number in range(1, small.STEPS + 1):
        moving, outputs = step(moving, small.step_inputs(backend, plan, constants, number))
        losses.append(backend.fetch_scalars(outputs)["loss"])
    return Run(plan, backend, {**moving, **frozen}, losses, backend.compile_count() - before)


def sharded_plan(case: str, mesh: tuple[int, int, int] | None = None) -> Plan:
    own, settings = CASES[case]
    fsdp, tensor, data = mesh or own
    return small.small_plan(fsdp, tensor, data, **{**settings, **({"expert": 1} if mesh else {})})


@cache
def run_of(case: str) -> Run:
    plan = sharded_plan(case)
    return steps_of(XlaBackend(plan, PERMUTED), plan)


@cache
def torch_run(case: str) -> Run:
    plan = small.torch_plan(**{**CASES[case][1], "remat": "none", "expert": 1})
    return steps_of(TorchBackend(plan), plan)


def whole_parts(run: Run) -> dict[str, Tensors]:
    parts = parts_of(run.state)
    return {part: small.whole_rows(run.backend, run.plan, tensors, part) for part, tensors in parts.items()}


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_equal_the_torch_backend(case: str) -> None:
    ours, theirs = run_of(case), torch_run(case)
    assert ours.compiles == 1
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert theirs.losses[0] > 1.001 * theirs.losses[-1], "losses that do not fall would always be equal"
    found, expected = whole_parts(ours), parts_of(theirs.state)
    assert {p: set(rows) for p, rows in found.items()} == {p: set(rows) for p, rows in expected.items()}
    start = source(ours.plan).tensors
    for part, rows in expected.items():
        for name, tensor in rows.items():
            inside = found[part][name][tuple(slice(0, n) for n in tensor.shape)]
            if ".lora_" in name:
                # AdamW divides the smallest gradients by their own size, so their rounding shows.
                assert small.difference(inside, tensor) <= (1e-3 if part == PARAMS else 1e-4), (part, name)
                assert part != PARAMS or not torch.equal(inside, start[name]), name
            else:
                assert part == PARAMS
                assert torch.equal(inside, start[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("case", CASES)
def test_adapters_alone_are_saved_and_go_on_over_their_base_on_another_mesh(
    case: str, tmp_path: Path
) -> None:
    run = run_of(case)
    names = {row.name for row in run.plan.table if row.is_adapter}
    saver = Checkpointer(run.plan, run.backend, tmp_path / "checkpoints")
    saver.save(3, parts_of(run.state), {"step": 3})
    saver.wait()
    saver.close()
    for part in run.plan.parts:
        assert set(read_tree(tmp_path / "checkpoints" / "3" / part)) <= names
    assert set(read_tree(tmp_path / "checkpoints" / "3" / PARAMS)) == names

    plan = sharded_plan(case, (2, 4, 1))
    backend = XlaBackend(plan, tuple(range(8)))
    checkpointer = Checkpointer(plan, backend, tmp_path / "checkpoints")
    saved = checkpointer.restore(3, tuple(plan.parts), lambda run: None).parts
    base = model_weights(plan, backend, small.DictSource(small.weights_of(base_of(plan))))
    parts = {**saved, PARAMS: joined_weights(backend, base, saved[PARAMS])}
    restored = Run(plan, backend, join_parts(parts, not_halted(backend)), [], 0)
    expected = whole_parts(run)
    for part, rows in whole_parts(restored).items():
        assert set(rows) == set(expected[part])
        sizes = {row.name: row.size for row in plan.parts[part].rows}
        for name, tensor in rows.items():
            inside = tuple(slice(0, n) for n in sizes[name])
            assert torch.equal(tensor[inside], expected[part][name][inside]), (part, name)
