"""Expected traffic: by hand for a small model on fsdp=4 x tensor=2, and between slices."""

from __future__ import annotations

import pytest

from tests.config.samples import MIXTRAL
from tests.estimate.workloads import small_plan, small_work
from tptrain.estimate.collectives import Collective, collectives
from tptrain.estimate.workload import workload_of
from tptrain.mesh import AXES, MeshShape

# Numbers that a device computes with, of what fsdp splits: half of everything, because of tensor=2.
LAYER = (2 * 96 * 96 + 2 * 48 * 96 + 3 * 176 * 96) // 2
HEAD = 1032 * 96 // 2
# Where tensor does not split the vocabulary, it is not padded either.
WHOLE_HEAD = 1031 * 96
NORMS = 7 * 96
STREAM = 12 * 256 * 96 * 2


def _found(*overrides: str) -> dict[tuple[str, str, str, str], Collective]:
    plan = small_plan(*overrides)
    return {
        (each.kind, each.axis, each.network, each.what): each
        for each in collectives(workload_of(plan), plan.mesh)
    }


def _bytes(found: dict[tuple[str, str, str, str], Collective]) -> dict[tuple[str, str, str, str], int]:
    return {key: each.received_bytes for key, each in found.items()}


EXPECTED = {
    ("all-gather", "fsdp", "ICI", "weights: layers, forward"): 3 / 4 * 3 * LAYER * 2,
    ("all-gather", "fsdp", "ICI", "weights: head"): 3 / 4 * HEAD * 2,
    ("all-gather", "fsdp", "ICI", "weights: layers, backward"): 3 / 4 * 3 * LAYER * 2,
    ("reduce-scatter", "fsdp", "ICI", "gradients"): 3 / 4 * (3 * LAYER + HEAD) * 2,
    ("all-reduce", "fsdp", "ICI", "gradients"): 2 * 3 / 4 * NORMS * 2,
    ("all-to-all", "fsdp", "ICI", "activations: embedding"): 3 / 4 * 2 * STREAM,
    ("all-reduce", "tensor", "ICI", "activations: embedding, and layers forward"): 2 * 1 / 2 * 7 * STREAM,
    ("all-reduce", "tensor", "ICI", "activations: layers computed again"): 2 * 1 / 2 * 3 * STREAM,
    ("all-reduce", "tensor", "ICI", "activations: layers backward, and head"): 2 * 1 / 2 * 7 * STREAM,
}


def test_bytes_by_hand() -> None:
    assert _bytes(_found()) == EXPECTED


def test_counts() -> None:
    found = _found()
    counts = {(each.kind, each.what): each.count for each in found.values()}
    assert counts["all-gather", "weights: layers, forward"] == 3 * 7
    assert counts["all-gather", "weights: head"] == 1
    assert counts["reduce-scatter", "gradients"] == 3 * 7 + 1
    assert counts["all-to-all", "activations: embedding"] == 2
    assert counts["all-reduce", "gradients"] == 7
    assert counts["all-reduce", "activations: layers computed again"] == 3


def test_micro_batches_repeat_the_weights_and_not_the_activations() -> None:
    once, four = _found(), _found("optim.accumulation=4")
    for key, each in four.items():
        grows = not key[3].startswith("activations")
        assert each.received_bytes == (4 if grows else 1) * once[key].received_bytes, key
        assert each.count == 4 * once[key].count, key


def test_kept_activations_are_not_reduced_again() -> None:
    again = ("all-reduce", "tensor", "ICI", "activations: layers computed again")
    assert again in _found("remat.policy=full")
    assert again not in _found("remat.policy=none")


def test_layers_below_what_is_trained_send_nothing_back() -> None:
    """The middle layer of three is trained: the way back goes through two, gradients are those of one."""
    found = _bytes(_found("model.trainable=model.layers.1.*"))
    assert found == {
        **EXPECTED,
        ("all-gather", "fsdp", "ICI", "weights: layers, backward"): 3 / 4 * 2 * LAYER * 2,
        ("reduce-scatter", "fsdp", "ICI", "gradients"): 3 / 4 * LAYER * 2,
        ("all-reduce", "fsdp", "ICI", "gradients"): 2 * 3 / 4 * 2 * 96 * 2,
        ("all-to-all", "fsdp", "ICI", "activations: embedding"): 3 / 4 * STREAM,
        ("all-reduce", "tensor", "ICI", "activations: layers computed again"): 2 * 1 / 2 * 2 * STREAM,
        ("all-reduce", "tensor", "ICI", "activations: layers backward, and head"): 2 * 1 / 2 * 5 * STREAM,
    }


def test_one_device_sends_nothing() -> None:
    assert _found("topology=cpu-1") == {}


def test_replicas_sum_what_is_left_of_their_gradients() -> None:
    found = _bytes(_found("topology=cpu-8", "mesh.data=4", "mesh.fsdp=2"))
    local = (3 * 2 * LAYER + 2 * WHOLE_HEAD) // 2 + NORMS
    assert found["all-reduce", "data", "ICI", "gradients"] == 2 * 3 / 4 * local * 2
    assert found["all-gather", "fsdp", "ICI", "weights: head"] == 1 / 2 * WHOLE_HEAD * 2


def test_between_slices_goes_what_a_slice_has_left() -> None:
    """data = 2 x 3 slices: an ICI all-reduce, and a DCN one of the half that each chip has then."""
    work = small_work("topology=cpu-12", "mesh.data=6", "mesh.fsdp=2")
    mesh = MeshShape((2, 2, 1, 1, 1), (3, 1, 1, 1, 1))
    found = {each.network: each for each in collectives(work, mesh) if each.axis == "data"}
    local = sum(work.local_elements(row) for row in work.table)
    assert found["ICI"].received_bytes == 2 * 1 / 2 * local * 2
    assert found["DCN"].received_bytes == round(2 * 2 / 3 * local * 2 / 2)


def test_weights_over_dcn_come_before_ici() -> None:
    """fsdp = 4 in each of 2 slices: half of a quarter over DCN, then three quarters over ICI."""
    work = small_work("topology=cpu-8", "mesh.fsdp=8")
    mesh = MeshShape((1, 4, 1, 1, 1), (1, 2, 1, 1, 1))
    found = {
        each.network: each.received_bytes for each in collectives(work, mesh) if each.what == "weights: head"
    }
    assert found == {"DCN": WHOLE_HEAD * 2 / 4 / 2, "ICI": WHOLE_HEAD * 2 * 3 / 4}


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_is_collected_as_the_head_alone(tied: bool) -> None:
    assert _bytes(_found(f"model.config.tie_word_embeddings={str(tied).lower()}")) == EXPECTED


def test_an_exchange_between_slices_is_not_thinned_out_before() -> None:
    work = small_work("topology=cpu-8", "mesh.fsdp=8")
    mesh = MeshShape((1, 4, 1, 1, 1), (1, 2, 1, 1, 1))
    found = {
        each.network: each.received_bytes for each in collectives(work, mesh) if each.kind == "all-to-all"
    }
    both = 2 * 6 * 256 * 96 * 2
    assert found == {"ICI": 3 / 4 * both, "DCN": 1 / 2 * both}


def test_every_axis_is_one_of_the_mesh() -> None:
    assert {axis for _, axis, _, _ in _found()} <= set(AXES)


MIXTRAL_ON_A_MESH = (*MIXTRAL, "topology=cpu-8", "mesh.fsdp=2", "mesh.expert=2", "mesh.tensor=2")


def test_tokens_go_to_the_experts_and_weights_to_the_tokens() -> None:
    """48 rows over fsdp=2 x expert=2; six experts of width 176, two of which each token goes to."""
    found = _bytes(_found(*MIXTRAL_ON_A_MESH))
    # Over expert, 3 layers: what two devices have of the stream, half of which comes from the other.
    for kind, what, times in (
        ("all-gather", "forward", 1), ("reduce-scatter", "forward", 1),
        ("all-gather", "backward", 2), ("reduce-scatter", "backward", 1),
    ):  # fmt: skip
        key = (kind, "expert", "ICI", f"tokens of experts, {what}")
        assert found[key] == 3 * times * 1 / 2 * 2 * STREAM
    # Attention and router are collected over both axes, expert first; experts over fsdp alone.
    dense = (2 * 96 * 96 + 2 * 48 * 96) // 2 + 6 * 96
    experts = 3 * (3 * 176 * 96) // 2
    what = "weights: layers, forward"
    assert found["all-gather", "fsdp", "ICI", what] == 1 / 2 * 3 * (dense + experts) * 2
    assert found["all-gather", "expert", "ICI", what] == 1 / 2 * 3 * dense / 2 * 2
    # No one sums gradients of experts over the axis that splits them: norms alone are left.
    assert found["all-reduce", "expert", "ICI", "gradients"] == 2 * 1 / 2 * NORMS * 2


def test_without_an_expert_axis_tokens_stay() -> None:
    found = _found(*MIXTRAL, "topology=cpu-8", "mesh.fsdp=4", "mesh.tensor=2")
    assert not any("tokens of experts" in key[3] or key[1] == "expert" for key in found)
