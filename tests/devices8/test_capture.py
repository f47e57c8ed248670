"""The captured train step: compiled once, replayed with donated buffers, and equal to the torch backend's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch_xla

from tests import small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.backends.xla.capture import CapturedStep, CaptureError
from tptrain.config import Plan
from tptrain.train.state import HALTED, fresh_state, part_of, state_specs
from tptrain.train.step import make_train_step

IDENTITY = tuple(range(8))
PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)

# data, fsdp, tensor, order
CASES = {
    "8x1": (1, 8, 1, IDENTITY),
    "4x2": (1, 4, 2, IDENTITY),
    "4x2 permuted": (1, 4, 2, PERMUTED),
    "2x2x2 permuted": (2, 2, 2, PERMUTED),
}


@dataclass
class Run:
    """Ten steps of a small model, and what was seen around each of them.

    traces:   how often the Python of the step ran.
    compiles: programs compiled by the process: before the capture, after it, after each step.
    first:    a state that a step has consumed. state: the newest one.
    moved:    per step, the buffers of weights that changed.
    """

    backend: Any
    plan: Plan
    step: Any
    constants: Tensors
    state: Tensors
    traces: int = 0
    compiles: list[int] = field(default_factory=list)
    outputs: list[dict[str, float]] = field(default_factory=list)
    moved: list[set[str]] = field(default_factory=list)
    first: Tensors = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [outputs["loss"] for outputs in self.outputs]

    def inputs(self, step: int) -> Tensors:
        return small.step_inputs(self.backend, self.plan, self.constants, step)


def ten_steps(backend: Any, plan: Plan) -> Run:
    decoder = backend.decoder()
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    state = fresh_state(backend, small.DictSource(small.weights_of(small.reference())))
    run = Run(backend, plan, None, constants, state)
    function = make_train_step(decoder, backend.layout, plan.recipe)

    def counted(state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        run.traces += 1
        return function(state, inputs)

    run.compiles.append(backend.compile_count())
    run.step = backend.compile_step(counted, state, run.inputs(1), state_specs(backend))
    run.compiles.append(backend.compile_count())
    before = small.whole_rows(backend, plan, part_of(state, "params"))
    for number in range(1, small.STEPS + 1):
        run.first = run.state if number == 1 else run.first
        run.state, outputs = run.step(run.state, run.inputs(number))
        run.outputs.append(backend.fetch_scalars(outputs))
        after = small.whole_rows(backend, plan, part_of(run.state, "params"))
        run.moved.append({name for name in after if not torch.equal(after[name], before[name])})
        before = after
        run.compiles.append(backend.compile_count())
    return run


@cache
def run_of(case: str) -> Run:
    data, fsdp, tensor, order = CASES[case]
    plan = small.small_plan(fsdp, tensor, data)
    return ten_steps(XlaBackend(plan, order), plan)


@cache
def torch_run() -> Run:
    plan = small.torch_plan()
    return ten_steps(TorchBackend(plan), plan)


def final_weights(run: Run) -> Tensors:
    """By row name; replicas are found equal on the way."""
    return small.whole_rows(run.backend, run.plan, part_of(run.state, "params"))


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_equal_the_torch_backend(case: str) -> None:
    ours, theirs = run_of(case), torch_run()
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert theirs.losses[0] > 2 * theirs.losses[-1], "losses that do not fall would always be equal"
    for one, other in zip(ours.outputs, theirs.outputs, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["counted"] == other["counted"] and one["finite"] == 1
    weights = final_weights(theirs)
    for name, own in final_weights(run_of(case)).items():
        expected = weights[name]
        kept = own[tuple(slice(size) for size in expected.shape)]  # without the padding of a split vocabulary
        assert small.difference(kept, expected) < 1e-3, name


@pytest.mark.parametrize("case", CASES)
def test_one_trace_and_one_compile_serve_all_steps(case: str) -> None:
    run = run_of(case)
    before, captured, *later = run.compiles
    assert captured == before + 1
    assert later == [captured] * small.STEPS
    assert run.traces == 1
    assert run.step.trace_seconds > 0 and run.step.compile_seconds > 0
    assert torch_run().traces == small.STEPS


@pytest.mark.parametrize("case", CASES)
def test_every_weight_moves_at_every_step(case: str) -> None:
    run = run_of(case)
    stored = {row.name for row in run.plan.table if row.tied_to is None}
    assert run.moved == [stored] * small.STEPS


def test_a_consumed_state_is_dead() -> None:
    run = run_of("4x2")
    assert set(run.first) == set(run.state) and HALTED in run.first
    for name, tensor in run.first.items():
        with pytest.raises(RuntimeError, match=r"HasValue|deleted or donated"):
            tensor.cpu()
        assert torch.isfinite(run.state[name].cpu()).all(), name
    for name, tensor in run.constants.items():
        assert torch.isfinite(tensor.cpu()).all(), f"{name} is an input, which a step must leave alone"


def test_every_captured_argument_is_known() -> None:
    """The graph's parameters are the state, the inputs, and numbers of the formulas; each array once."""
    run = run_of("4x2")
    named = [argument for argument in run.step._arguments if isinstance(argument, str)]
    assert sorted(named) == sorted([*run.state, *run.inputs(1)])
    numbers = [argument for argument in run.step._arguments if not isinstance(argument, str)]
    assert all(number.ndim == 0 for number in numbers) and len(numbers) == len(run.step.constants)
    scalars = run.backend.put_scalars({"learning_rate": 0.0123})
    assert not any(abs(value - scalars["learning_rate"].item()) < 1e-6 for value in run.step.constants)


def test_another_learning_rate_is_not_another_program() -> None:
    run = run_of("4x2")
    count = run.backend.compile_count()
    before = small.whole_rows(run.backend, run.plan, part_of(run.state, "params"))
    inputs = run.inputs(11) | run.backend.put_scalars({"learning_rate": 0.0})
    run.state, _ = run.step(run.state, inputs)
    after = small.whole_rows(run.backend, run.plan, part_of(run.state, "params"))
    assert all(torch.equal(after[name], before[name]) for name in before), "the rate is an input"
    assert run.backend.compile_count() == count


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("tokens", lambda t: t[..., :-3]),
        ("weights", lambda t: t.to(torch.float64)),
        ("learning_rate", lambda t: t[None]),
    ],
)
def test_another_shape_is_refused_by_name(name: str, changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    run = run_of("4x2")
    inputs = run.inputs(3)
    compiled, other = inputs[name], changed(inputs[name])
    with pytest.raises(CaptureError) as error:
        run.step(run.state, {**inputs, name: other})
    for part in (f"'{name}'", *(f"{list(t.shape)} {t.dtype}" for t in (compiled, other))):
        assert part in str(error.value)
    assert run.backend.fetch_scalars({"halted": run.state[HALTED]}) == {"halted": 0}, "nothing was consumed"


def test_a_missing_and_an_unknown_argument_are_refused_by_name() -> None:
    run = run_of("4x2")
    inputs = run.inputs(3)
    with pytest.raises(CaptureError, match=r"'dropout'.*compiled for not an argument"):
        run.step(run.state, {**inputs, "dropout": inputs["learning_rate"]})
    del inputs["targets"]
    with pytest.raises(CaptureError, match=r"'targets'.*\[1, 8, 32\].*given missing"):
        run.step(run.state, inputs)


# What a step must not do, on steps of two lines.


@cache
def toy_backend() -> XlaBackend:
    return XlaBackend(small.small_plan(4, 2), PERMUTED)


def toy(function: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]) -> CapturedStep:
    """A captured step over the state `a` [8, 6] and the inputs `b` [8, 6] and `rate`."""
    backend = toy_backend()
    spec = (("fsdp",), ("tensor",))
    state = {"a": backend.mesh.place_full(torch.randn(8, 6), spec)}
    inputs = {"b": backend.mesh.place_full(torch.randn(8, 6), spec), **backend.put_scalars({"rate": 0.5})}
    return backend.compile_step(function, state, inputs, {"a": spec})


def test_a_foreign_tensor_is_refused_with_its_shape() -> None:
    foreign = toy_backend().put_constant(torch.randn(6))

    def step(state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        return {"a": state["a"] + inputs["b"] * inputs["rate"] + foreign}, {}

    with pytest.raises(CaptureError, match=re.escape("[6] torch.float32")):
        toy(step)


def test_an_unused_input_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"does not read its arguments b$"):
        toy(lambda state, inputs: ({"a": state["a"] * inputs["rate"]}, {}))


def test_an_unused_state_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"does not read its arguments a$"):
        toy(lambda state, inputs: ({"a": inputs["b"] * inputs["rate"]}, {}))


def test_a_step_that_renames_its_state_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"names of its state: \['a', 'z'\]"):
        toy(lambda state, inputs: ({"z": state["a"] * inputs["rate"] + inputs["b"]}, {}))


def test_a_refused_step_leaves_the_process_sound() -> None:
    """After the refusals above, nothing pending leaks into the next program."""
    torch_xla.sync()
    backend = toy_backend()
    spec = (("fsdp",), ("tensor",))
    a, b = torch.randn(8, 6), torch.randn(8, 6)
    step = toy(lambda state, inputs: ({"a": state["a"] * inputs["rate"] + inputs["b"]}, {}))
    inputs = {"b": backend.mesh.place_full(b, spec), **backend.put_scalars({"rate": 0.25})}
    state, _ = step({"a": backend.mesh.place_full(a, spec)}, inputs)
    assert torch.equal(state["a"].cpu(), a * 0.25 + b)
