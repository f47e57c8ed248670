"""Which activations a layer has, and how large they are on one device."""

from __future__ import annotations

import ast

import pytest

from tests.estimate.workloads import ROOT, llama3_plan, small_work
from tptrain.config.remat import KEPT, LAYER_INPUT, OFFLOADED
from tptrain.config.settings import settings
from tptrain.estimate.activations import (
    LAYER,
    device_bytes,
    in_flight_bytes,
    kept_bytes,
    layer_activations,
    logits_bytes,
    offloaded_bytes,
    shared_bytes,
    stream_bytes,
)
from tptrain.estimate.workload import Workload, workload_of

# 12 of 48 rows on a device, 256 tokens of each; half of the heads, MLP and vocabulary; bfloat16.
TOKENS = 12 * 256
STREAM = TOKENS * 96 * 2
BY_HAND = {
    "attention_input": STREAM,
    "query": TOKENS * 4 * 12 * 2,
    "key": TOKENS * 2 * 12 * 2,
    "value": TOKENS * 2 * 12 * 2,
    "scores": 12 * 2 * 2 * 256 * 256 * 2,
    "attended": TOKENS * 4 * 12 * 2,
    "after_attention": STREAM,
    "mlp_input": STREAM,
    "gate": TOKENS * 88 * 2,
    "up": TOKENS * 88 * 2,
    "mlp_hidden": TOKENS * 88 * 2,
}


def _sizes(work: Workload) -> dict[str, int]:
    return {each.name: device_bytes(each, work) for each in layer_activations(work)}


def test_sizes_of_a_layer_by_hand() -> None:
    assert _sizes(small_work()) == BY_HAND


# A kernel's heads have 128 lanes, of which these heads fill 12; in place of scores it has a number a head.
WITH_HEADS = ("query", "key", "value", "attended")
BY_HAND_SPLASH = {
    **{name: size * (128 / 12 if name in WITH_HEADS else 1) for name, size in BY_HAND.items()},
    "logsumexp": TOKENS * 4 * 4,
}
del BY_HAND_SPLASH["scores"]


def test_splash_has_no_scores_but_one_float32_a_head_and_token() -> None:
    assert _sizes(small_work(attention="splash")) == BY_HAND_SPLASH


def test_what_lives_beside_the_layers_by_hand() -> None:
    work = small_work()
    assert stream_bytes(work) == STREAM
    assert logits_bytes(work) == TOKENS * (1032 // 2) * 2
    # cos and sin, and a mask of one byte a pair of tokens.
    rotary = 2 * TOKENS * 12 * 2
    assert shared_bytes(work) == rotary + 12 * 256 * 256
    assert shared_bytes(small_work(attention="splash")) == rotary * 128 / 12


@pytest.mark.parametrize(
    ("remat", "attention", "kept"),
    [
        ("full", "plain", ()),
        ("attention", "plain", ("attended",)),
        ("attention", "splash", ("attended", "logsumexp")),
        ("dots", "plain", ("query", "key", "value", "attended", "gate", "up")),
        (
            "dots",
            "splash",
            ("query", "key", "value", "attended", "logsumexp", "gate", "up"),
        ),
        ("none", "plain", tuple(BY_HAND)),
        (
            "none",
            "splash",
            tuple(BY_HAND_SPLASH),
        ),
    ],
)
def test_kept_by_each_policy(remat: str, attention: str, kept: tuple[str, ...]) -> None:
    sizes = BY_HAND if attention == "plain" else BY_HAND_SPLASH
    work = small_work(remat=remat, attention=attention)
    assert kept_bytes(work) == 3 * (STREAM + sum(sizes[name] for name in kept))


def test_in_flight_is_a_layer_and_the_gradients_of_its_larger_block() -> None:
    values = {name: size for name, size in BY_HAND.items() if name != "scores"}
    attention = sum(size for name, size in values.items() if not name.startswith(("mlp", "gate", "up")))
    scores = 12 * 2 * 2 * 256 * 256
    assert in_flight_bytes(small_work(), 6.0) == sum(values.values()) + attention + 6 * scores
    assert in_flight_bytes(small_work(), 16.0) == sum(values.values()) + attention + 16 * scores
    splash = _sizes(small_work(attention="splash"))
    mlp = splash["mlp_input"] + 3 * splash["gate"]
    larger = max(sum(splash.values()) - mlp, mlp)
    assert in_flight_bytes(small_work(attention="splash"), 16.0) == sum(splash.values()) + larger
    # Without scores and with short heads, the MLP is the larger block.
    wide = small_work("model.config.head_dim=12", "model.config.intermediate_size=2048", attention="splash")
    sizes = _sizes(wide)
    assert in_flight_bytes(wide, 16.0) == sum(sizes.values()) + sizes["mlp_input"] + 3 * sizes["gate"]


def test_a_fused_backward_kernel_writes_the_gradient_of_queries_for_each_tile_of_keys() -> None:
    settings = ("kernels.splash_fused_backward=true", "kernels.splash_block_kv=1024")
    fused = workload_of(llama3_plan("v5p-32", 8192, 16, "kernels.attention=splash", *settings))
    separate = workload_of(llama3_plan("v5p-32", 8192, 16, "kernels.attention=splash"))
    assert (fused.query_gradient_parts, separate.query_gradient_parts) == (8, 0)
    one = 8192 * 4096 * 2
    block = {"attention": 0, "mlp": 0}
    for activation in layer_activations(separate):
        block[activation.block] += device_bytes(activation, separate)
    grown = in_flight_bytes(fused, 0.0) - in_flight_bytes(separate, 0.0)
    assert grown == max(block["attention"] + 8 * one, block["mlp"]) - max(block.values()) > 0


def test_chunks_of_the_loss_hold_their_part_of_the_logits() -> None:
    whole = logits_bytes(small_work())
    assert logits_bytes(small_work(loss_chunk_tokens=256)) == whole
    assert logits_bytes(small_work(loss_chunk_tokens=64)) == whole / 4


def test_marked_activations_are_those_of_the_decoder() -> None:
    """Names and dims that the models give to their marks, read from the source: torch stays out."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tptrain" / "models").glob("*.py")]
    marks = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "marks":
            name, *dims = (arg.value for arg in node.args[1:] if isinstance(arg, ast.Constant))
            marks[name] = tuple(dims)
    ours = {each.name: each.dims for each in LAYER}
    assert {"query", "key", "value", "scores", "attended", "gate", "up"} <= marks.keys() & ours.keys()
    for name in marks.keys() & ours.keys():
        assert ours[name] == marks[name], name


def test_policies_name_activations_of_a_layer() -> None:
    # Rows are gathered again from the tokens, and the gated product is made again, in the grouped backward.
    names = {each.name for each in LAYER} - {"expert_rows", "expert_hidden"}
    assert frozenset[str]().union(*KEPT.values()) == names
    assert set(OFFLOADED) < set(KEPT) == set(settings()["remat.policy"].choices)
    for policy, away in OFFLOADED.items():
        assert away == KEPT[policy] | {LAYER_INPUT}


@pytest.mark.parametrize(
    ("remat", "attention", "away"),
    [
        ("offload", "splash", ()),
        ("offload_attention", "plain", ("attended",)),
        ("offload_attention", "splash", ("attended", "logsumexp")),
    ],
)
def test_what_is_offloaded_leaves_the_device(remat: str, attention: str, away: tuple[str, ...]) -> None:
    sizes = BY_HAND if attention == "plain" else BY_HAND_SPLASH
    work = small_work(remat=remat, attention=attention, offloaded=OFFLOADED[remat])
    assert kept_bytes(work) == 0
    assert offloaded_bytes(work) == 3 * (STREAM + sum(sizes[name] for name in away))
    here = small_work(remat=remat, attention=attention)
    assert (kept_bytes(here), offloaded_bytes(here)) == (offloaded_bytes(work), 0)
    assert in_flight_bytes(work, 6.0) == in_flight_bytes(here, 6.0)
