"""Each optimizer over eight devices: equal to the torch backend, and restored bit-equal on another mesh."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_xla

from tests import small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.ckpt.restoring import restore_part
from tptrain.config import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.errors import ProblemsError
from tptrain.train.state import begun_state, fresh_state, parts_of, split_frozen, state_specs
from tptrain.train.step import make_train_step

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
BFLOAT16 = torch.finfo(torch.bfloat16).eps

# Settings of a plan.
CASES: dict[str, dict[str, Any]] = {
    "adafactor": {
        "optim": {"name": "adafactor", "momentum": 0.9, "scale_parameter": True, "learning_rate": 0.05}
    },
    "bfloat16 moments": {"optim": {"moments_dtype": "bfloat16"}},
    "frozen": {
        "trainable": ("model.layers.*.self_attn.*", "lm_head.weight"),
        "remat": "full",
        "optim": {"eps": 1e-6},  # the products with frozen weights, in bfloat16, are rounded more
    },
    "frozen layers": {
        "trainable": ("model.embed_tokens.weight", "model.norm.weight"),
        "optim": {"name": "adafactor"},
    },
    # Runs of layers: frozen ones below, above and on both sides, of one turn and of two.
    "last layer": {"trainable": ("model.layers.2.*", "model.norm.weight", "lm_head.weight"), "remat": "full"},
    "middle layer": {"trainable": ("model.layers.1.*",), "remat": "dots", "accumulation": 2},
    "first layer": {
        "trainable": ("model.embed_tokens.weight", "model.layers.0.*"),
        "remat": "attention",
    },
    "attention of a layer": {
        "trainable": ("model.layers.1.self_attn.*",),
        "optim": {"name": "adafactor", "momentum": 0.9},
    },
    "last two layers": {"trainable": ("model.layers.[12].mlp.*",), "remat": "full"},
}


@dataclass
class Run:
    """Some steps of a plan. state: after the last one, frozen weights included."""

    plan: Plan
    backend: Any
    state: Tensors
    losses: list[float]
    compiles: int
    program: str


def steps_of(backend: Any, plan: Plan, count: int = small.STEPS) -> Run:
    decoder = backend.decoder()
    state = fresh_state(backend, small.DictSource(small.weights_of(small.reference())))
    moving, frozen = split_frozen(state, backend.layout)
    constants = {n: backend.put_constant(t) for n, t in decoder.constants().items()} | frozen
    function = make_train_step(decoder, backend.layout, plan.recipe)
    program = ""

    def traced(state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        nonlocal program
        new, outputs = function(state, inputs)
        if isinstance(backend, XlaBackend):
            program = torch_xla._XLAC._get_xla_tensors_hlo([*new.values(), *outputs.values()])
        return new, outputs

    before = backend.compile_count()
    inputs = small.step_inputs(backend, plan, constants, 1)
    step = backend.compile_step(traced, moving, inputs, state_specs(backend))
    losses = []
    for number in range(1, count + 1):
        moving, outputs = step(moving, small.step_inputs(backend, plan, constants, number))
        losses.append(backend.fetch_scalars(outputs)["loss"])
    return Run(plan, backend, {**moving, **frozen}, losses, backend.compile_count() - before, program)


@cache
def run_of(case: str) -> Run:
    plan = small.small_plan(4, 2, **CASES[case])
    return steps_of(XlaBackend(plan, PERMUTED), plan)


@cache
def torch_run(case: str) -> Run:
    plan = small.torch_plan(**{**CASES[case], "remat": "none"})
    return steps_of(TorchBackend(plan), plan)


def whole_parts(run: Run, state: Tensors) -> dict[str, Tensors]:
    """Part -> row name -> whole tensor in memory size."""
    parts = parts_of(state)
    return {part: small.whole_rows(run.backend, run.plan, tensors, part) for part, tensors in parts.items()}


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_equal_the_torch_backend(case: str) -> None:
    ours, theirs = run_of(case), torch_run(case)
    assert ours.compiles == 1
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert theirs.losses[0] > 1.01 * theirs.losses[-1], "losses that do not fall would always be equal"
    expected = parts_of(theirs.state)
    found = whole_parts(ours, ours.state)
    assert {p: set(rows) for p, rows in found.items()} == {p: set(rows) for p, rows in expected.items()}
    start = small.weights_of(small.reference())
    for part, rows in expected.items():
        for name, tensor in rows.items():
            mine = found[part][name]
            assert mine.dtype == tensor.dtype, (part, name)
            inside = mine[tuple(slice(0, n) for n in tensor.shape)].float()
            assert small.difference(inside, tensor.float()) <= tolerance(case, part), (part, name)
            if part == PARAMS:
                assert not mine[tensor.shape[0] :].any(), f"padding of {name}"
                frozen = tensor.dtype == torch.bfloat16
                assert torch.equal(inside, start[name].to(torch.bfloat16).float()) == frozen, name


def tolerance(case: str, part: str) -> float:
    """AdamW divides the smallest gradients by their own size, so their rounding shows in the weights.

    A moment between two bfloat16 numbers may be rounded to either.
    """
    if case == "bfloat16 moments" and part != PARAMS:
        return 2 * BFLOAT16
    is_adamw = CASES[case].get("optim", {}).get("name") != "adafactor"
    return 1e-3 if is_adamw and part == PARAMS else 1e-4


@pytest.mark.parametrize("case", CASES)
def test_another_mesh_restores_the_same_bits(case: str, tmp_path: Path) -> None:
    run = run_of(case)
    parts = parts_of(run.state)
    saver = Checkpointer(run.plan, run.backend, tmp_path / "checkpoints")
    saver.save(3, parts, {"step": 3})
    saver.wait()
    saver.close()
    plan = small.small_plan(2, 4, **CASES[case])
    other = Run(plan, XlaBackend(plan, tuple(range(8))), {}, [], 0, "")
    restored = Checkpointer(plan, other.backend, tmp_path / "checkpoints").restore(
        3, tuple(plan.parts), lambda run: None
    )
    expected = whole_parts(run, run.state)
    for part, rows in restored.parts.items():
        described = {row.name: row for row in plan.parts[part].rows}
        found = small.whole_rows(other.backend, plan, rows, part)
        assert set(found) == set(described) == set(expected[part])
        for name, tensor in found.items():
            inside = tuple(slice(0, n) for n in described[name].size)
            assert tensor.shape == described[name].padded_size
            assert tensor.dtype == expected[part][name].dtype
            assert torch.equal(tensor[inside], expected[part][name][inside]), (part, name)


def test_the_program_computes_no_gradient_of_a_frozen_weight() -> None:
    """The gradient of a weight is a matrix product of its size, which no activation has here."""
    everything, attention = run_of("adafactor").program, run_of("frozen").program
    for size, trained in ((176 * 120, False), (240 * 120, True), (80 * 120, True)):
        assert counted(everything, size), size
        assert bool(counted(attention, size)) == trained, size
    assert run_of("frozen layers").program.count(" while(") == run_of("frozen").program.count(" while(")


# Cases with frozen layers -> loops over layers of the forward and of the backward pass, and the stacks of two
# layers' inputs, [2, 8, 32, 120], that the program may hold.
LOOPS = {
    "last layer": (2, 1, False),
    "middle layer": (3, 2, False),
    "first layer": (2, 2, True),
    "attention of a layer": (3, 2, False),
    "last two layers": (2, 1, True),
}


@pytest.mark.parametrize("case", LOOPS)
def test_frozen_layers_at_the_bottom_keep_nothing_and_have_no_backward_loop(case: str) -> None:
    forward, backward, keeps_two = LOOPS[case]
    program, accumulation = run_of(case).program, CASES[case].get("accumulation", 1)
    loops = [line for line in program.splitlines() if " while(" in line and ",120,176]" in line]
    assert len(loops) == accumulation * (forward + backward)
    assert ("f32[2,8,32,120]" in program) == keeps_two


def counted(program: str, size: int) -> int:
    """Matrix products that give so many elements."""
    shapes = re.findall(r" = f32\[([\d,]+)\]\S* dot\(", program)
    return sum(math.prod(map(int, shape.split(","))) == size for shape in shapes)


def test_a_step_of_another_optimizer_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    plan = small.small_plan(8, 1)
    backend = XlaBackend(plan, PERMUTED)
    weights = small.DictSource(small.weights_of(small.reference()))
    saver = Checkpointer(plan, backend, tmp_path / "checkpoints")
    saver.save(1, parts_of(fresh_state(backend, weights)), {"step": 1})
    saver.wait()
    saver.close()
    changed = small.small_plan(8, 1, **CASES["frozen"] | {"optim": {"name": "adafactor"}})
    other = XlaBackend(changed, PERMUTED)
    step_folder = tmp_path / "checkpoints" / "1"
    with pytest.raises(ProblemsError) as error:
        Checkpointer(changed, other, step_folder.parent).restore(1, tuple(changed.parts), lambda run: None)
    (problem,) = error.value.problems
    assert problem.rule == "must hold what optim.name=adafactor keeps: nu_row, nu_col"
    assert problem.other == "it holds mu, nu, params, run"
    # Its weights alone will do: those to be frozen are rounded, nothing else is changed.
    params = restore_part(changed, other, step_folder, PARAMS, "model.pretrained")
    state = begun_state(other, params)
    assert set(parts_of(state)) == {"params", "nu_row", "nu_col"}
    for name, tensor in small.whole_rows(other, changed, params).items():
        start = weights.tensors[name]
        trained = ".self_attn." in name or name == "lm_head.weight"
        assert torch.equal(tensor, start if trained else start.to(torch.bfloat16)), name
