"""The costs of a whole module, all worked out by hand."""

from __future__ import annotations

import pytest

from tests.program.snippets import STEP
from tptrain.chips import CHIPS
from tptrain.program.analysis import ProgramCost, analyse, mfu
from tptrain.program.device_groups import MeshPlaces
from tptrain.program.hlo_text import parse_module
from tptrain.topology import parse_topology

MESH = MeshPlaces(parse_topology("v5e-4"), {"fsdp": 2, "tensor": 2}, (0, 1, 2, 3))
PRODUCT = 2 * 12 * 512 * 640
KERNEL = (
    "  %NAME_block_q_512.3 = (bf16[2,8,64,32]{3,2,1,0}) custom-call(%q, %q),"
    ' custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/NAME_block_q=512/pallas_call"}\n'
)
QUERY = "  %q = bf16[2,8,64,32]{3,2,1,0:T(8,128)(2,1)} bitcast(%param.4)\n"


def cost(text: str = STEP) -> ProgramCost:
    return analyse(parse_module(text), MESH, attention_density=0.5)


def test_cycles_of_loops_count_as_often_as_they_run() -> None:
    # The body has 3000 + 2000 + 500; inside fusions stands 777,777, which is not executed on its own.
    assert cost().estimated_cycles == 3 * 5500 + 70 + 100
    assert cost().estimated_seconds == pytest.approx(16_670 / 1.5e9)
    assert cost().notices == ()


def test_matrix_products_and_their_efficiency() -> None:
    flops = 3 * 2 * PRODUCT + 2 * 8 * 8 * 40
    assert cost().matmul_flops == flops
    assert cost().matmul_cycles == 3 * 5000 + 100
    assert cost().matmul_efficiency == pytest.approx(flops / 131_072 / 15_100)
    assert cost().total_flops == 4 * flops


def test_collectives_and_what_is_waited_for() -> None:
    table = {(use.kind, use.axes): use for use in cost().collectives}
    gather = table["all-gather", ("fsdp",)]
    assert (gather.executions, gather.num_bytes) == (6, 6 * 327_680)
    # One gather of two runs beside 3000 cycles, 2 microseconds.
    assert gather.seconds == pytest.approx(6 * 327_680 / 50e9)
    assert gather.exposed_seconds == pytest.approx(6 * 327_680 / 50e9 - 3 * 2e-6)
    assert gather.exposed_bytes == pytest.approx(6 * 327_680 - 3 * 2e-6 * 50e9)
    scatter = table["reduce-scatter", ("fsdp",)]
    assert (scatter.executions, scatter.num_bytes) == (3, 3 * 327_680)
    assert table["all-reduce", ("tensor",)].num_bytes == 3 * 12_288
    assert len(table) == 3


def test_the_score_is_the_sum_of_its_parts() -> None:
    exposed = (6 + 3) * 327_680 / 50e9 - 3 * 2e-6 + 3 * 12_288 / 50e9
    assert cost().exposed_seconds == pytest.approx(exposed)
    assert cost().score_seconds == pytest.approx(16_670 / 1.5e9 + exposed)


def test_mfu() -> None:
    score = cost().score_seconds
    assert mfu(cost(), 1e9, MESH.topology) == pytest.approx(1e9 / (score * 4 * 197e12))


def test_kernels_count_at_half_of_the_peak() -> None:
    text = STEP.replace(
        "  %slice-done = ", QUERY + KERNEL.replace("NAME", "splash_mha_fwd") + "  %slice-done = "
    )
    found = cost(text)
    flops = 2 * 2 * (2 * 8 * 64 * 32) * 64 * 0.5
    assert [(one.name, one.executions, one.flops) for one in found.kernels] == [("splash_mha_fwd", 1, flops)]
    assert found.kernel_seconds == pytest.approx(flops / (0.5 * 197e12))
    assert found.score_seconds == pytest.approx(cost().score_seconds + found.kernel_seconds)


def test_a_kernel_without_flops_is_told() -> None:
    text = STEP.replace("  %slice-done = ", QUERY + KERNEL.replace("NAME", "my_kernel") + "  %slice-done = ")
    assert cost(text).notices == ("the kernel my_kernel states no FLOPs and counts as none",)


def test_host_memory_without_known_copies_is_told() -> None:
    call = '  %stack = bf16[4,8]{1,0:T(8,128)(2,1)S(5)} custom-call(), custom_call_target="AllocateBuffer"\n'
    found = cost(STEP.replace("  %slice-done = ", call + "  %slice-done = "))
    notice = "copies to and from the host's memory are in no known form and count as none"
    assert found.notices == (notice,)
    assert found.score_seconds == cost().score_seconds


def branch(name: str, cycles: int) -> str:
    return (
        f"%{name} (p.{name}: f32[8]) -> f32[8] {{\n  %p.{name} = f32[8] parameter(0)\n"
        f'  ROOT %r.{name} = f32[8] copy(%p.{name}), backend_config={{"estimated_cycles":"{cycles}"}}\n}}\n\n'
    )


def test_the_costliest_branch_counts() -> None:
    text = STEP.replace("ENTRY", branch("cheap", 5) + branch("dear", 900) + "ENTRY")
    call = "  %both = f32[8] conditional(%param.6, %param.6, %param.6), branch_computations={%cheap, %dear}\n"
    found = cost(text.replace("  %slice-done = ", call + "  %slice-done = "))
    assert found.estimated_cycles == cost().estimated_cycles + 900
    assert found.notices == ("of the 2 branches of both the costliest counts",)


@pytest.mark.parametrize("name", ["v4", "v5p", "v5e", "v6e"])
def test_peak_is_clock_times_matrix_units(name: str) -> None:
    chip = CHIPS[name]
    assert chip.clock_hertz and chip.mxu_flops_per_cycle
    assert chip.clock_hertz * chip.mxu_flops_per_cycle == pytest.approx(
        chip.peak_bf16_flops_per_second, rel=2e-3
    )


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5e-16", (False, False, False)),
        ("v6e-256", (True, True, False)),
        ("v5e:8x16", (False, True, False)),
        ("v5p-32", (False, False, False)),
        ("v5p:4x4x8", (True, True, True)),
    ],
)
def test_rings(name: str, wraps: tuple[bool, bool, bool]) -> None:
    assert parse_topology(name).wraps == wraps
