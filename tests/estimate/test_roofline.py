"""FLOPs against counted matrix products, and the arithmetic of the roofline."""

from __future__ import annotations

import pytest

from tests.estimate.workloads import llama3_plan, llama3_work, small_plan, small_work
from tptrain.estimate import estimate
from tptrain.estimate.roofline import attended_pairs, step_flops

LAYER, HEAD = 2 * 96 * 96 + 2 * 48 * 96 + 3 * 176 * 96, 1031 * 96
MATRICES = 3 * LAYER + HEAD
TOKENS = 48 * 256
# Scores and weighted values of the pairs under the diagonal, of all heads and layers.
ATTENTION = 3 * 48 * 4 * 96 * (256 * 257 // 2)


def test_model_flops_by_hand() -> None:
    assert step_flops(small_work()).model == 6 * MATRICES * TOKENS + 3 * ATTENTION
    assert step_flops(small_work("optim.accumulation=4")).model == 6 * MATRICES * TOKENS + 3 * ATTENTION


def test_frozen_matrices_have_no_gradient_of_their_own() -> None:
    down = 3 * 176 * 96
    trained = step_flops(small_work("model.trainable=model.layers.*.mlp.down_proj.weight")).model
    assert trained == (4 * MATRICES + 2 * down) * TOKENS + 3 * ATTENTION
    # Below a head that is trained alone, nothing goes back.
    alone = step_flops(small_work("model.trainable=lm_head.weight"))
    assert alone.model == (2 * 3 * LAYER + 6 * HEAD) * TOKENS + ATTENTION
    assert alone.recomputed == 0
    # Through a frozen head the gradient of its input goes to the norm.
    assert step_flops(small_work("model.trainable=model.norm.weight")).model == (
        (2 * 3 * LAYER + 4 * HEAD) * TOKENS + ATTENTION
    )


@pytest.mark.parametrize(
    ("trainable", "layers_back", "trained"),
    [
        ("model.layers.2.*,lm_head.weight", 1, LAYER + HEAD),
        ("model.layers.1.self_attn.*", 2, 2 * 96 * 96 + 2 * 48 * 96),
        ("model.embed_tokens.weight,model.layers.0.*", 3, LAYER),
    ],
)
def test_layers_below_what_is_trained_have_no_backward_pass(
    trainable: str, layers_back: int, trained: int
) -> None:
    """Full remat: what has one is computed again, but for the last matrix."""
    found = step_flops(small_work(f"model.trainable={trainable}"))
    forward, inputs = 3 * LAYER + HEAD, layers_back * LAYER + HEAD
    core = ATTENTION / 3
    assert found.model == 2 * (forward + inputs + trained) * TOKENS + (3 + 2 * layers_back) * core
    assert found.recomputed == layers_back * (2 * (LAYER - 176 * 96) * TOKENS + core)


@pytest.mark.parametrize(
    ("remat", "attention", "matrices", "attention_part"),
    [
        # All but down_proj, whose output no gradient needs.
        ("full", "plain", 3 * (2 * 96 * 96 + 2 * 48 * 96 + 2 * 176 * 96), 1),
        ("attention", "plain", 3 * (2 * 96 * 96 + 2 * 48 * 96 + 2 * 176 * 96), 0.5),
        ("attention", "splash", 3 * (2 * 96 * 96 + 2 * 48 * 96 + 2 * 176 * 96), 0),
        # The output projection of attention.
        ("dots", "plain", 3 * 96 * 96, 0.5),
        ("dots", "splash", 3 * 96 * 96, 0),
        ("none", "plain", 0, 0),
    ],
)
def test_recomputed_flops(remat: str, attention: str, matrices: int, attention_part: float) -> None:
    found = step_flops(small_work(remat=remat, attention=attention)).recomputed
    assert found == 2 * matrices * TOKENS + attention_part * ATTENTION


@pytest.mark.parametrize(("seq_len", "counted_tflop"), [(2048, 226.2), (8192, 905.0)])
def test_llama3_8b_as_counted_in_the_compiled_program(seq_len: int, counted_tflop: float) -> None:
    """Matrix products of a chip, kernels not counted: fsdp=16, two rows a chip, full remat."""
    found = step_flops(llama3_work(seq_len, 2))
    kernels = 4 * 32 * 32 * 4 * 32 * 128 * attended_pairs(seq_len, None)
    per_chip = (found.model + found.recomputed - kernels) / 16
    assert per_chip / 1e12 == pytest.approx(counted_tflop, rel=0.001)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 9])
def test_attended_pairs_are_those_of_a_mask(window: int | None) -> None:
    mask = [q - k >= 0 and (window is None or q - k < window) for q in range(7) for k in range(7)]
    assert attended_pairs(7, window) == sum(mask)


def test_seconds_by_hand() -> None:
    found = estimate(llama3_plan("v5p-32", 2048, 32))
    line = found.roofline
    assert line is not None
    assert line.compute_seconds == (line.flops.model + line.flops.recomputed) / (16 * 459e12)
    moved = sum(each.received_bytes for each in found.collectives)
    assert line.ici_seconds == pytest.approx(moved / 300e9)
    assert (line.busiest_axis, line.dcn_seconds) == ("fsdp", 0)
    # 8.03e9 parameters: 12 bytes read, 12 written, and a bfloat16 gradient, on 16 chips; norms on each.
    assert line.update_seconds == pytest.approx(26 * 8_030_261_248 / 16 / 2765e9, rel=1e-3)
    assert line.fastest_seconds == max(line.compute_seconds, line.ici_seconds) + line.update_seconds
    assert line.slowest_seconds == pytest.approx(
        line.compute_seconds + line.ici_seconds + line.update_seconds
    )
    assert line.tokens_per_second_per_chip == pytest.approx(2 * 2048 / line.fastest_seconds)
    assert line.mfu == line.flops.model / (16 * 459e12) / line.fastest_seconds < 1


@pytest.mark.parametrize(("topology", "speed"), [("v6e-16", 32e9), ("v5p-32", 15e9)])
def test_offloaded_activations_go_out_and_come_back_over_the_host_link(topology: str, speed: float) -> None:
    """Two micro-batches, each with the inputs of 32 layers, [3, 8192, 4096] in bfloat16."""
    given = ("kernels.attention=splash", "optim.accumulation=2")
    here = estimate(llama3_plan(topology, 8192, 96, *given)).roofline
    away = estimate(llama3_plan(topology, 8192, 96, *given, "remat.policy=offload")).roofline
    assert here is not None and away is not None
    assert (here.host_seconds, here.flops) == (0.0, away.flops)
    assert away.host_seconds == 2 * (2 * 32 * 3 * 8192 * 4096 * 2) / speed
    assert away.fastest_seconds == here.fastest_seconds, "compute is longer, and runs beside"
    assert away.slowest_seconds == pytest.approx(here.slowest_seconds + away.host_seconds)


def test_layers_that_keep_nothing_offload_nothing() -> None:
    """Of 32 layers the last four keep their inputs, [3, 8192, 4096] in bfloat16."""
    given = ("kernels.attention=splash", "remat.policy=offload")
    last = "model.trainable=model.layers.2[89].*,model.layers.3?.*"
    found = estimate(llama3_plan("v6e-16", 8192, 48, *given, last))
    assert found.roofline is not None
    assert found.roofline.host_seconds == 2 * (4 * 3 * 8192 * 4096 * 2) / 32e9
    assert found.hosts.offload_bytes == 4 * (4 * 3 * 8192 * 4096 * 2)


def test_a_host_link_that_limits_is_told() -> None:
    """So few heads and so small an MLP that a layer computes for less than its input is on its way."""
    small = ("model.config.intermediate_size=512", "model.config.head_dim=8", "kernels.attention=plain")
    found = estimate(llama3_plan("v5p-32", 1024, 32, *small, "remat.policy=offload"))
    line = found.roofline
    assert line is not None and line.host_seconds is not None
    assert line.fastest_seconds == line.host_seconds + line.update_seconds
    assert any("the host link is the limit" in notice for notice in found.notices)


def test_no_bound_is_above_the_compiled_estimate() -> None:
    """MaxText's four rows with full remat on v5p-32, half of peak added for its attention kernels."""
    rows = {(2048, 1): 0.515, (2048, 2): 0.949, (8192, 1): 2.252, (8192, 2): 4.341}
    for (seq_len, per_chip), seconds in rows.items():
        line = estimate(llama3_plan("v5p-32", seq_len, 16 * per_chip)).roofline
        assert line is not None
        assert 0.4 * seconds < line.fastest_seconds < seconds


def test_virtual_devices_have_no_roofline() -> None:
    found = estimate(small_plan())
    assert found.roofline is None
    assert found.verdict == "no limit"
    assert found.memory.total_bytes > 0


def test_v4_counts_bytes_but_no_seconds_between_slices() -> None:
    found = estimate(llama3_plan("2xv4-32", 512, 64))
    assert found.roofline is not None and found.roofline.dcn_seconds == 0
    assert any(each.network == "DCN" and each.received_bytes for each in found.collectives)
    assert any("no published speed between slices" in notice for notice in found.notices)
