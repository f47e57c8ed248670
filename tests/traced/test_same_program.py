"""What the dry run compiles is what a run compiles: instruction by instruction, before optimizations."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from jax._src.lib import xla_client

from tests import adapters, small
from tests.traced.dumped import module_of
from tptrain.backends.base import TensorSource, TracedStep
from tptrain.backends.xla.backend import XlaBackend
from tptrain.backends.xla.hlo_proto import read_module
from tptrain.backends.xla.placeholders import PlaceholderBackend
from tptrain.config import Plan, PrecisionSection
from tptrain.config.planning import plan_recipe
from tptrain.jaxside.random_init import RandomSource
from tptrain.train.state import HALTED, fresh_state, split_frozen, state_specs
from tptrain.train.step import prepare_step, step_placeholders

_xla: Any = xla_client._xla


def placeholder_trace(plan: Plan) -> TracedStep:
    backend = PlaceholderBackend(plan)
    function, constants = prepare_step(backend, plan)
    state, frozen = split_frozen(fresh_state(backend, backend.no_source), backend.layout)
    inputs = {**step_placeholders(backend, plan), **constants, **frozen}
    return backend.trace_step(function, state, inputs, state_specs(backend))


def compiled_by_a_run(plan: Plan, source: TensorSource, dump: Path) -> bytes:
    """The module that XLA was handed when a run compiled its step on real buffers."""
    backend = XlaBackend(plan, tuple(range(8)))
    function, constants = prepare_step(backend, plan)
    state, frozen = split_frozen(fresh_state(backend, source), backend.layout)
    backend.sync()
    inputs = small.step_inputs(backend, plan, {**constants, **frozen}, 1)
    before = set(dump.iterdir())
    backend.compile_step(function, state, inputs, state_specs(backend))
    programs = [p for p in set(dump.iterdir()) - before if p.name.endswith("before_optimizations.hlo.pb")]
    (path,) = [p for p in programs if p.stat().st_size == max(q.stat().st_size for q in programs)]
    return module_of(path.read_bytes())


def text_of(module: bytes) -> list[str]:
    """Lines of a module: instructions, shapes, shardings, donors, constants; without its name."""
    options = _xla.HloPrintOptions()
    options.print_large_constants, options.print_metadata = True, False
    text = _xla.HloModule.from_serialized_hlo_module_proto(module).to_string(options)
    return re.sub(r"\b(SyncTensorsGraph|IrToHlo)\.\d+", "step", text).splitlines()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_module_is_the_one_that_a_run_compiles(accumulation: int, tied: bool, dump: Path) -> None:
    config = small.LLAMA3_TIED if tied else small.LLAMA3
    plan = small.small_plan(4, 2, config=config, accumulation=accumulation, remat="full")
    traced = placeholder_trace(plan)
    read = small.DictSource(small.weights_of(small.reference(tied)))
    source = read if accumulation == 1 else RandomSource(0, 0.02)  # either, at no further compile
    ours, theirs = text_of(traced.module), text_of(compiled_by_a_run(plan, source, dump))
    assert len(ours) > 1000 and "buffer_donor" in ours[0]
    assert ours == theirs


def test_a_micro_batch_waits_for_the_gradients_of_the_one_before() -> None:
    """Or activations of several would be kept at a time: a barrier holds all sums and the next rows."""
    plan = small.small_plan(4, 2, accumulation=3)
    barriers = [line for line in text_of(placeholder_trace(plan).module) if " opt-barrier(" in line]
    between = {line.split(" opt-barrier(")[0] for line in barriers if "s32[" in line}
    trained = len(PlaceholderBackend(plan).layout.buffers)
    assert len(between) >= 2
    assert {(line.count("f32["), line.count("s32[")) for line in between} == {(trained + 1, 4)}


def test_so_it_is_with_adapters(dump: Path) -> None:
    """Of what the layers hold, adapters alone are written over."""
    plan = small.small_plan(4, 2, lora={"rank": 3, "targets": ("heads", "down_proj")}, remat="dots")
    traced = placeholder_trace(plan)
    source = adapters.weights_of(small.reference(), plan, adapters.random_adapters(plan))
    ours, theirs = text_of(traced.module), text_of(compiled_by_a_run(plan, source, dump))
    assert ours == theirs
    assert all(".lora_" in name for name in traced.donated if name.startswith(("params/", "mu/", "nu/")))
    assert sum(name.startswith("params/") for name in traced.donated) == 2 * 3


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_so_it_is_where_layers_run_in_several_loops(compute: Any, dump: Path) -> None:
    """The middle layer of three is trained; what is frozen is an input that nothing writes over.

    One of trained and frozen weights is cast for the compute format, and the moments are for the update.
    """
    plan = small.small_plan(
        4, 2, trainable=("model.layers.1.*",), remat="attention", optim={"moments_dtype": "bfloat16"}
    )
    mixed = PrecisionSection(compute=compute)
    plan = plan_recipe(dataclasses.replace(plan.recipe, precision=mixed), environ={})
    traced = placeholder_trace(plan)
    source = small.DictSource(small.weights_of(small.reference()))
    ours, theirs = text_of(traced.module), text_of(compiled_by_a_run(plan, source, dump))
    assert ours == theirs
    moving = {name.split(".")[2] for name in traced.donated if ".layers." in name}
    given = {name.split(".")[2] for name in traced.parameters if name and ".layers." in name}
    assert (moving, given) == ({"1"}, {"0", "1", "2"})
    # Forward through three, backward through the upper two.
    assert sum(" while(" in line and ",120,176]" in line for line in ours) == 3 + 2


def test_names_specs_and_donors_are_those_of_the_parameters() -> None:
    plan = small.small_plan(4, 2)
    traced = placeholder_trace(plan)
    module = read_module(traced.module)
    donors = {traced.parameters[entry.parameter_number] for entry in module.buffer_donor.entries}
    assert donors == traced.donated == set(state_specs(PlaceholderBackend(plan)))
    assert traced.specs["params/lm_head.weight"] == (("tensor",), ("fsdp",)) and traced.specs[HALTED] == ()
    assert traced.outputs[-5:] == ("loss", "counted", "grad_norm", "finite", "spike")
    # The batch and the learning rate are parameters, so no value of theirs is part of the program.
    assert {"tokens", "weights", "learning_rate", "bias_correction1", "norm_limit"} <= set(traced.parameters)


def test_two_traces_are_equal_and_state_leaves_as_it_came() -> None:
    plan = small.small_plan(2, 2, data=2)
    first, second = placeholder_trace(plan), placeholder_trace(plan)
    assert first.module == second.module
    backend = PlaceholderBackend(plan)
    assert backend.changed_specs(first) == ()


def test_state_that_changes_its_sharding_is_told() -> None:
    plan = small.small_plan(4, 2)
    backend = PlaceholderBackend(plan)
    function, constants = prepare_step(backend, plan)
    inputs = {**step_placeholders(backend, plan), **constants}
    specs = {**state_specs(backend), "mu/lm_head.weight": ((), ("fsdp",))}
    traced = backend.trace_step(function, fresh_state(backend, backend.no_source), inputs, specs)
    assert backend.changed_specs(traced) == ("mu/lm_head.weight",)
