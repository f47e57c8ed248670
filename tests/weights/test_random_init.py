"""RandomSource: numbers depend on seed, name and position alone, and only what is asked for is generated."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from tptrain.weights.random_init import BLOCK_ROWS

from tptrain.family.table import ParamRow, bias, matrix, norm_scale
from tptrain.weights import RandomSource

ROW = matrix("model.embed_tokens.weight", ("vocab", "embed"), (2 * BLOCK_ROWS + 77, 6))
WHOLE = (slice(None), slice(None))


def test_slices_are_parts_of_one_tensor() -> None:
    full = RandomSource(3, 0.02).read(ROW, WHOLE)
    rows = [(0, 5), (1000, 1030), (1024, 2048), (7, 2125), (2048, 2125), (9, 9)]
    columns = [(0, 6), (1, 4), (5, 6)]
    for (r0, r1), (c0, c1) in itertools.product(rows, columns):
        index = (slice(r0, r1), slice(c0, c1))
        assert torch.equal(RandomSource(3, 0.02).read(ROW, index), full[index])


def test_order_and_other_rows_make_no_difference() -> None:
    other = matrix("lm_head.weight", ROW.dims, ROW.size)
    source = RandomSource(3, 0.02)
    first = source.read(ROW, WHOLE)
    source.read(other, (slice(5, 9), slice(None)))
    assert torch.equal(source.read(ROW, WHOLE), first)
    assert not torch.equal(source.read(other, WHOLE), first)


def test_seed_changes_every_number() -> None:
    one, two = (RandomSource(seed, 0.02).read(ROW, WHOLE) for seed in (3, 4))
    assert (one != two).all()


def test_blocks_do_not_repeat() -> None:
    full = RandomSource(0, 1.0).read(ROW, WHOLE)
    assert (full[:BLOCK_ROWS] != full[BLOCK_ROWS : 2 * BLOCK_ROWS]).all()


def test_distribution() -> None:
    values = RandomSource(1, 0.05).read(matrix("w", ("mlp", "embed"), (3000, 301)), WHOLE)
    assert values.dtype == torch.float32
    assert values.mean().abs() < 3e-4 and abs(values.std().item() / 0.05 - 1) < 5e-3
    assert abs((values.abs() < 0.05).float().mean().item() - 0.6827) < 3e-3


def test_a_seed_means_the_same_numbers_on_every_machine() -> None:
    """A digest, so that an upgrade of numpy or a change of the blocks cannot pass unseen."""
    values = RandomSource(0, 0.02).read(ROW, WHOLE)
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == (
        "842ea4285db573486a3cf4d87403e7051c25f6a2b1f097da9cae59592375425f"
    )


def test_norms_are_ones_and_biases_zeros() -> None:
    source = RandomSource(0, 0.02)
    assert torch.equal(source.read(norm_scale("n", 5), (slice(1, 4),)), torch.ones(3))
    assert torch.equal(source.read(bias("b", "heads", 5), (slice(None),)), torch.zeros(5))


def test_only_touched_blocks_are_generated_and_memory_is_bounded() -> None:
    huge = matrix("w", ("vocab", "embed"), (10**9, 4))  # 16 GB in full
    source = RandomSource(0, 0.02)
    source.read(huge, (slice(7 * 10**8, 7 * 10**8 + 10), slice(None)))
    assert source.blocks_generated == 1


def test_blocks_of_the_last_row_are_kept_for_the_next_device() -> None:
    source = RandomSource(0, 0.02)
    for column in range(6):
        source.read(ROW, (slice(None), slice(column, column + 1)))
    assert source.blocks_generated == 3


def test_the_cache_has_a_limit() -> None:
    block_bytes = BLOCK_ROWS * 6 * 4
    source = RandomSource(0, 0.02, cache_bytes=block_bytes)
    first = source.read(ROW, WHOLE)
    assert torch.equal(source.read(ROW, WHOLE), first)
    assert source.blocks_generated == 3 + 2  # one block kept, two made again


def test_what_is_read_may_be_written_to() -> None:
    source = RandomSource(0, 0.02)
    first = source.read(ROW, WHOLE)
    kept = first.clone()
    first.zero_()
    assert torch.equal(source.read(ROW, WHOLE), kept)


def test_a_tied_row_is_never_asked_for() -> None:
    tied = ParamRow("lm_head.weight", ROW.dims, ROW.size, ROW.size, tied_to=ROW.name)
    with pytest.raises(AssertionError, match="is tied to"):
        RandomSource(0, 0.02).read(tied, WHOLE)
