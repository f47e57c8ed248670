"""Bytes of hosts and files, by hand; the export's size as the exporter itself counts it."""

from __future__ import annotations

import pytest

from tests.estimate.workloads import llama3_plan, small_plan
from tptrain.estimate import estimate, host_memory_problems
from tptrain.estimate.hosts import host_needs
from tptrain.report.plan_page import plan_page

ELEMENTS = 3 * (2 * 96 * 96 + 2 * 48 * 96 + 3 * 176 * 96 + 2 * 96) + 2 * 1031 * 96 + 96


def test_files_hold_no_padding() -> None:
    needs = host_needs(small_plan())
    assert needs.checkpoint_bytes == 12 * ELEMENTS
    assert needs.exported_bytes == 2 * ELEMENTS
    assert host_needs(small_plan("export.dtype=float32")).exported_bytes == 4 * ELEMENTS
    # The run of 40 steps saves at its end alone; a longer one keeps two, beside the one that is written.
    assert needs.checkpoints == 2
    longer = small_plan("schedule.max_steps=4000", "save.keep_every=2000")
    assert host_needs(longer).checkpoints == 2 + 2 + 1


def test_no_export_needs_nothing() -> None:
    needs = host_needs(small_plan("export.enabled=false"))
    assert (needs.export_bytes, needs.exported_bytes) == (None, None)


def test_loading_holds_two_neighbouring_buffers() -> None:
    """Three layers stacked: gate and up follow each other, and the eight devices are on one host."""
    embedding, gate = 1032 * 96 * 4, 3 * 176 * 96 * 4
    assert embedding + 3 * 96 * 96 * 4 > 2 * gate
    assert host_needs(small_plan()).load_bytes == embedding + 3 * 96 * 96 * 4
    many = host_needs(small_plan("model.config.num_hidden_layers=6"))
    assert many.load_bytes == 4 * gate


def test_a_buffer_holds_the_layers_of_one_run() -> None:
    """Of six layers five are frozen: the largest neighbours are then five layers of gate and up, bfloat16."""
    last = "model.trainable=model.layers.5.*"
    cut = host_needs(small_plan("model.config.num_hidden_layers=6", last, "model.config.vocab_size=263"))
    assert cut.load_bytes == 2 * 5 * 176 * 96 * 2


def test_devices_with_the_same_piece_share_it() -> None:
    split = host_needs(small_plan("topology=cpu-8", "mesh.fsdp=8")).load_bytes
    replicas = host_needs(small_plan("topology=cpu-8", "mesh.fsdp=4", "mesh.data=2")).load_bytes
    assert split == replicas


@pytest.mark.parametrize(("topology", "hosts"), [("v6e-8", 1), ("v5p-32", 4)])
def test_a_save_copies_the_share_of_a_host(topology: str, hosts: int) -> None:
    needs = host_needs(llama3_plan(topology, 512, 64))
    assert needs.save_bytes == round(1.2 * 12 * 8_030_261_248 / hosts)
    # The stacked gate and up projections, of which a host has its part.
    assert needs.load_bytes == 2 * 32 * 14336 * 4096 * 4 / hosts
    assert needs.export_bytes == 150_000_000


# 3 rows of 8192 tokens on each chip: the inputs of 32 layers, [3, 8192, 4096] in bfloat16.
OFFLOADED = 32 * 3 * 8192 * 4096 * 2


@pytest.mark.parametrize(
    ("topology", "chips", "memory"), [("v6e-8", 8, 1440e9), ("v6e-16", 4, 720e9), ("v5p-32", 4, 448e9)]
)
def test_offloaded_activations_are_in_the_memory_of_the_chips_host(
    topology: str, chips: int, memory: float
) -> None:
    devices = {"v6e-8": 8}.get(topology, 16)
    plan = llama3_plan(topology, 8192, 3 * devices, "kernels.attention=splash", "remat.policy=offload")
    needs = host_needs(plan)
    assert (needs.offload_bytes, needs.memory_bytes) == (chips * OFFLOADED, memory)
    assert host_memory_problems(plan, needs) == []
    assert f"{chips * 6}.00 GiB of the" in plan_page(plan)
    halved = llama3_plan(topology, 8192, 6 * devices, "remat.policy=offload", "optim.accumulation=2")
    assert host_needs(halved).offload_bytes == chips * OFFLOADED


def test_what_stays_on_the_chips_is_not_counted() -> None:
    needs = host_needs(llama3_plan("v6e-16", 8192, 48))
    assert (needs.offload_bytes, needs.memory_bytes) == (0, 720e9)
    virtual = host_needs(small_plan("remat.policy=offload"))
    assert (virtual.offload_bytes, virtual.memory_bytes) == (0, None)


def test_activations_that_a_host_cannot_hold_are_a_problem() -> None:
    """22 rows a chip of v5e: 8 x 44 GiB beside a save's 108 GiB; the host of 8 chips has 384 GB."""
    plan = llama3_plan("v5e-8", 8192, 8 * 22, "kernels.attention=splash", "remat.policy=offload")
    found = estimate(plan)
    (problem,) = host_memory_problems(plan, found.hosts)
    assert (problem.setting, problem.value) == ("remat.policy", "offload")
    for part in ("352.00 GiB of activations", "107.69 GiB for saves", "of the 357.63 GiB", "8 chips"):
        assert part in problem.other
    fewer = llama3_plan("v5e-8", 8192, 8 * 2, "kernels.attention=splash", "remat.policy=offload")
    assert host_memory_problems(fewer, estimate(fewer).hosts) == []
