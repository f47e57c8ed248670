"""Bytes of a chip: by hand for a small model, against a compiler's numbers for a large one."""

from __future__ import annotations

import dataclasses

import pytest

from tests.estimate.workloads import GIB, llama3_work, small_work
from tptrain.estimate.memory import FITTED, Memory, memory, verdict
from tptrain.estimate.workload import StateTensor

# Numbers of one layer on one device of fsdp=4 x tensor=2: q, o; k, v; gate, up, down; two norms, not split.
LAYER = (2 * 96 * 96 + 2 * 48 * 96 + 3 * 176 * 96) // 8 + 2 * 96
HEAD = 1032 * 96 // 8
LOCAL = 2 * HEAD + 3 * LAYER + 96
# The largest matrix of a layer, as a device computes with it: the four pieces of fsdp.
MATRIX = 176 * 96 // 2
STREAM = 12 * 256 * 96 * 2
LOGITS = 12 * 256 * 516 * 2
# Values: input, q, k, v, attended and what is after it; input, gate, up, hidden. Gradients of the first six,
# and 16 bytes a score, of 4 of 8 heads.
ATTENTION, MLP = 12 * 256 * 2 * (2 * 96 + 2 * 48 + 2 * 24), 12 * 256 * 2 * (96 + 3 * 88)
IN_FLIGHT = round(FITTED.in_flight * (2 * ATTENTION + MLP + 16 * 12 * 4 * 256 * 256))


def _phases(found: Memory) -> dict[str, dict[str, int]]:
    return {phase.name: dict(phase.parts) for phase in found.phases}


def test_arguments_by_hand() -> None:
    found = memory(small_work())
    assert found.arguments == {
        "parameters": 4 * LOCAL,
        "optimizer state": 8 * LOCAL,
        "batch": 12 * 256 * 5 * 4,
    }
    assert found.argument_bytes == 12 * LOCAL + 12 * 256 * 20


def test_phases_by_hand() -> None:
    """Full remat, plain attention, all logits at once."""
    all_along = {
        "cast weights": 2 * 3 * LAYER,
        "kept activations": 3 * STREAM,
        "masks and rotary tables": 12 * 256 * 256 + 2 * 12 * 256 * 12 * 2,
    }
    around_loss = {**all_along, "gathered weights": 2 * 4 * HEAD, "activations in flight": 3 * STREAM}
    assert _phases(memory(small_work())) == {
        "loss": {**around_loss, "logits": 2 * LOGITS},
        "gradient of the head": {
            **around_loss,
            "logits": LOGITS,
            "gradients before their reduction": 2 * 4 * HEAD,
        },
        "backward pass of the layers": {
            **all_along,
            "gathered weights": 2 * 2 * MATRIX,
            "activations in flight": IN_FLIGHT,
            "gradients before their reduction": 2 * MATRIX,
            "gradients": 2 * (3 * LAYER + HEAD),
        },
        "gradient of the embedding": {
            "activations in flight": 2 * STREAM,
            "gradients": 2 * LOCAL,
        },
        "update": {"gradients": 2 * LOCAL},
    }


def test_the_peak_is_the_largest_phase() -> None:
    found = memory(small_work())
    assert found.peak.name == "backward pass of the layers"
    assert found.temporary_bytes == found.peak.total_bytes == sum(found.peak.parts.values())
    assert found.total_bytes == found.argument_bytes + found.temporary_bytes
    # Without scores the logits of a larger vocabulary are the largest.
    large = small_work("model.config.vocab_size=8191", attention="splash")
    assert memory(large).peak.name == "loss"


@pytest.mark.parametrize(
    ("seq_len", "rows_per_chip", "temporaries_gib"),
    [(2048, 1, 3.81), (2048, 2, 4.94), (8192, 1, 7.99), (8192, 2, 14.10)],
)
def test_llama3_8b_as_libtpu_compiled_it(seq_len: int, rows_per_chip: int, temporaries_gib: float) -> None:
    """fsdp=16 on v5p-32, full remat, splash attention, all logits: MaxText's program, libtpu 0.0.52."""
    found = memory(llama3_work(seq_len, rows_per_chip))
    assert found.argument_bytes / GIB == pytest.approx(5.61, abs=0.01)
    assert found.temporary_bytes / GIB == pytest.approx(temporaries_gib, rel=0.02)


def test_twice_the_fsdp_halves_what_it_splits() -> None:
    four, eight = (
        memory(small_work("topology=cpu-8", "mesh.fsdp=4", "mesh.data=2")),
        memory(small_work("topology=cpu-8", "mesh.fsdp=8")),
    )
    norms = 4 * 7 * 96
    assert eight.arguments["parameters"] - norms == (four.arguments["parameters"] - norms) / 2
    assert (
        eight.arguments["optimizer state"] - 2 * norms == (four.arguments["optimizer state"] - 2 * norms) / 2
    )
    # Activations follow the batch, which is split by both axes in either case.
    assert _phases(eight)["loss"]["logits"] == _phases(four)["loss"]["logits"]


def test_twice_the_rows_are_twice_the_activations_and_the_same_weights() -> None:
    once, twice = (_phases(memory(small_work(f"data.batch_rows={rows}"))) for rows in (48, 96))
    for phase, parts in twice.items():
        for name, size in parts.items():
            grows = name in ("kept activations", "masks and rotary tables", "activations in flight", "logits")
            expected = (2 if grows else 1) * once[phase][name]
            assert abs(size - expected) <= 1, (phase, name)  # a factor of the compiler may have rounded it


def test_accumulation_takes_float32_sums_and_smaller_activations() -> None:
    one, three = memory(small_work()), memory(small_work("optim.accumulation=3"))
    assert three.arguments == one.arguments
    layers, before = (_phases(m)["backward pass of the layers"] for m in (three, one))
    assert layers["gradient sums"] == 4 * LOCAL
    assert layers["kept activations"] == before["kept activations"] / 3
    assert _phases(three)["update"] == {"gradient sums": 4 * LOCAL}


def test_one_row_on_a_device_and_float32_need_fewer_scores() -> None:
    scores = 4 * 256 * 256
    for overrides, width in (
        (["data.batch_rows=4"], 2),
        (["data.batch_rows=8", "precision.compute=float32"], 4),
    ):
        rows = int(overrides[0].split("=")[1]) // 4
        found = _phases(memory(small_work(*overrides)))["backward pass of the layers"]
        others = rows * width * (2 * ATTENTION + MLP) // (12 * 2)
        assert found["activations in flight"] == round(
            FITTED.in_flight * (others + 3 * width * rows * scores)
        )


def test_chunks_of_the_loss_sum_the_head_in_float32() -> None:
    found = _phases(memory(small_work(loss_chunk_tokens=32)))
    assert "gradient of the head" not in found
    assert found["loss"]["logits"] == LOGITS / 8
    assert found["loss"]["gradients before their reduction"] == (4 + 2) * 4 * HEAD
    # A chunk of all tokens sums nothing, and makes one copy of the logits do.
    whole, plain = (_phases(memory(small_work(loss_chunk_tokens=n))) for n in (256, None))
    assert plain.pop("loss")["logits"] == 2 * LOGITS
    assert whole == plain


def test_float32_compute_needs_no_copies_and_wider_activations() -> None:
    narrow, wide = memory(small_work()), memory(small_work("precision.compute=float32"))
    assert _phases(wide)["loss"]["cast weights"] == 0
    assert _phases(wide)["loss"]["kept activations"] == 2 * _phases(narrow)["loss"]["kept activations"]
    # On one device the head is used as it is stored.
    alone = memory(small_work("topology=cpu-1", "precision.compute=float32"))
    assert _phases(alone)["loss"]["gathered weights"] == 0


def test_a_tied_head_is_one_row() -> None:
    tied = memory(small_work("model.config.tie_word_embeddings=true"))
    assert tied.arguments["parameters"] == 4 * (LOCAL - HEAD)
    assert _phases(tied)["loss"]["gathered weights"] == 2 * 4 * HEAD


def test_frozen_rows_have_no_moments_and_no_gradients() -> None:
    work = small_work()
    table = tuple(
        dataclasses.replace(row, trainable=False, storage_dtype="bfloat16") if "mlp" in row.name else row
        for row in work.table
    )
    moments = tuple(
        StateTensor(row, work.specs[row.name]) for _ in range(2) for row in table if row.trainable
    )
    frozen_work = dataclasses.replace(work, table=table, optimizer=moments)
    found = memory(frozen_work)
    frozen = 3 * 3 * 176 * 96 // 8
    assert found.arguments["parameters"] == 4 * (LOCAL - frozen) + 2 * frozen
    assert found.arguments["optimizer state"] == 8 * (LOCAL - frozen)
    assert _phases(found)["update"]["gradients"] == 2 * (LOCAL - frozen)
    # They are stored in the compute format already.
    assert _phases(found)["loss"]["cast weights"] == 2 * (3 * LAYER - frozen)


def test_layers_below_what_is_trained_keep_nothing() -> None:
    """Of three layers the last is trained: one input is kept, one layer cast, and its gradients are made."""
    found = memory(small_work("model.trainable=model.layers.2.*,lm_head.weight"))
    moving = LAYER + HEAD
    assert found.arguments["parameters"] == 4 * moving + 2 * (LOCAL - moving)
    assert found.arguments["optimizer state"] == 8 * moving
    phases = _phases(found)
    assert list(phases) == ["loss", "gradient of the head", "backward pass of the layers", "update"]
    assert phases["loss"]["kept activations"] == STREAM
    assert phases["loss"]["cast weights"] == 2 * LAYER
    assert phases["backward pass of the layers"]["activations in flight"] == IN_FLIGHT
    assert phases["backward pass of the layers"]["gradients"] == phases["update"]["gradients"] == 2 * moving


def test_frozen_layers_above_what_is_trained_keep_what_the_way_back_needs() -> None:
    for trainable in ("model.layers.1.*", "model.layers.1.mlp.down_proj.weight"):
        phases = _phases(memory(small_work(f"model.trainable={trainable}")))
        assert phases["loss"]["kept activations"] == 2 * STREAM
        assert phases["gradient of the head"]["gradients before their reduction"] == 0
    phases = _phases(memory(small_work("model.trainable=model.embed_tokens.weight")))
    assert phases["loss"]["kept activations"] == 3 * STREAM
    assert phases["backward pass of the layers"]["gradients before their reduction"] == 0
    assert phases["gradient of the embedding"]["gradients"] == 2 * HEAD


def test_below_a_head_that_is_trained_alone_layers_have_a_forward_pass_only() -> None:
    phases = _phases(memory(small_work("model.trainable=lm_head.weight")))
    assert list(phases) == ["loss", "gradient of the head", "forward pass of the layers", "update"]
    layers = phases["forward pass of the layers"]
    assert layers["kept activations"] == layers["cast weights"] == 0
    assert layers["activations in flight"] == round(
        FITTED.in_flight * (STREAM + ATTENTION + 16 * 12 * 4 * 256 * 256)
    )
    assert "gradients" not in layers


def test_other_optimizers_keep_other_tensors() -> None:
    """The first moment alone, in bfloat16; and of the head a number per row, split as its rows are."""
    work = small_work()
    narrow = tuple(
        dataclasses.replace(each, row=dataclasses.replace(each.row, storage_dtype="bfloat16"))
        for each in work.optimizer[: len(work.table)]
    )
    assert memory(dataclasses.replace(work, optimizer=narrow)).arguments["optimizer state"] == 2 * LOCAL
    row = dataclasses.replace(work.head, dims=("vocab",), size=(1031,), padded_size=(1032,))
    factored = dataclasses.replace(work, optimizer=(StateTensor(row, (("tensor",),)),))
    assert memory(factored).arguments["optimizer state"] == 4 * 1032 // 2


def test_a_period_of_two_layers_keeps_half_the_inputs_and_works_with_both() -> None:
    work = small_work("model.config.num_hidden_layers=6")
    kind = work.facts.layer_period[0]
    pair = dataclasses.replace(
        work, facts=dataclasses.replace(work.facts, layer_period=(kind, dataclasses.replace(kind, window=64)))
    )
    one, two = (_phases(memory(each))["backward pass of the layers"] for each in (work, pair))
    assert two["kept activations"] == one["kept activations"] / 2
    # Scores exist for one layer at a time.
    more = two["activations in flight"] - one["activations in flight"]
    assert more == pytest.approx(FITTED.in_flight * (ATTENTION + MLP), abs=1)
    # A mask for each window.
    assert two["masks and rotary tables"] - one["masks and rotary tables"] == 12 * 256 * 256


def test_the_fitted_factor_is_on_the_temporaries_alone() -> None:
    work = small_work()
    plain, more = memory(work), memory(work, dataclasses.replace(FITTED, temporaries=1.25))
    assert more.argument_bytes == plain.argument_bytes
    assert more.temporary_bytes == round(1.25 * plain.temporary_bytes)


@pytest.mark.parametrize(
    ("total", "limit", "words"),
    [
        (100, None, "no limit"),
        (100, 99, "does not fit"),
        (100, 100, "tight"),
        (100, 109, "tight"),
        (100, 111, "fits"),
    ],
)
def test_verdicts(total: int, limit: int | None, words: str) -> None:
    assert verdict(total, limit, margin=0.10) == words
