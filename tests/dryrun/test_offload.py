"""Activations in the host's memory, as the TPU compiler places them: the whole step, by real compiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.config.samples import small_recipe
from tptrain.config import Plan
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.dryrun.command import compile_request
from tptrain.dryrun.compiling import compile_program
from tptrain.dryrun.tracing import trace_in_child
from tptrain.estimate.activations import offloaded_bytes
from tptrain.estimate.workload import workload_of
from tptrain.program.compiled import CompiledProgram
from tptrain.report.program_lines import program_lines

COMPILERS = [None, *(Path(path) for path in os.environ.get("TPTRAIN_LIBTPUS", "").split(":") if path)]
# So many thin layers that what they keep is most of the memory; their number costs the compiler nothing.
OVERRIDES = (
    *("topology=v5e-4", "mesh.fsdp=4", "data.batch_rows=32", "data.seq_len=256"),
    *("model.config.hidden_size=256", "model.config.intermediate_size=384"),
    *("model.config.num_attention_heads=2", "model.config.num_key_value_heads=1"),
    # Plain attention compiles in half the time of the kernels.
    *("model.config.num_hidden_layers=96", "kernels.attention=plain"),
)
# Of each layer on each chip: [8, 256, 256] in bfloat16, twice.
STACKS = 96 * 2 * 8 * 256 * 256 * 2


def planned(remat: str) -> Plan:
    return plan_recipe(apply_overrides(small_recipe(), [*OVERRIDES, f"remat.policy={remat}"]), {})


def compiled(remat: str, libtpu: Path | None) -> CompiledProgram:
    plan = planned(remat)
    program = compile_program(compile_request(plan, trace_in_child(plan), libtpu))
    assert (program.outcome, program.message) == ("compiled", "")
    return program


def copies(program: CompiledProgram) -> dict[str, tuple[int, float]]:
    """Kind -> executions and bytes of the copies over PCIe."""
    assert program.cost
    uses = [use for use in program.cost.collectives if use.network == "PCIe"]
    return {use.kind: (use.executions, use.num_bytes) for use in uses}


@pytest.mark.parametrize("libtpu", COMPILERS)
def test_stacks_of_activations_leave_the_chip(
    libtpu: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers' inputs, and what attention gave."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    away, here = compiled("offload_attention", libtpu), compiled("attention", libtpu)
    assert away.memory and here.memory and away.cost and here.cost
    assert offloaded_bytes(workload_of(planned("offload_attention"))) == STACKS
    assert (here.memory.host_bytes, away.memory.host_bytes) == (0, STACKS)
    assert here.memory.temporary_bytes > 0.7 * STACKS
    assert away.memory.temporary_bytes < 0.3 * STACKS
    assert away.memory.aliased_bytes == here.memory.aliased_bytes
    assert away.cost.total_flops == here.cost.total_flops
    assert copies(away) == {
        "copy to host": (2 * 96, STACKS),
        "copy from host": (2 * 96, STACKS),
    }
    assert copies(here) == {} and away.cost.notices == here.cost.notices
    assert " in the host's memory" in "\n".join(program_lines(away, None))
