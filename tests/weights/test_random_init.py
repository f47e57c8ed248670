"""RandomSource: numbers depend on seed, name and position alone, and are those of JAX's generator."""

from __future__ import annotations

import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import erfinv

from tptrain.family.lora import adapter_rows
from tptrain.family.table import ParamRow, bias, matrix, norm_scale
from tptrain.jaxside.random_init import RandomSource, inverse_erf, key_words, row_key

ROW = matrix("model.embed_tokens.weight", ("vocab", "embed"), (1031, 6))
WHOLE = (slice(None), slice(None))


def test_the_numbers_are_those_of_jax() -> None:
    """But for rounding: erf_inv of JAX is up to 6e-6 of a number off, near the ends; ours 3e-7."""
    ours = RandomSource(3, 0.05).read(ROW, WHOLE).numpy()
    theirs = np.asarray(jax.random.normal(row_key(3, ROW.name), ROW.size, jnp.float32)) * 0.05
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_key_is_the_beginning_of_a_hash() -> None:
    digest = hashlib.sha256(b"3/model.embed_tokens.weight").digest()
    low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    assert key_words(3, "model.embed_tokens.weight").tolist() == [low, high]


def test_the_inverse_error_function() -> None:
    """Also where it is steep: the last float32 before 1, and both sides of the switch of polynomials."""
    one = np.float32(1)
    ends = [np.nextafter(one, np.float32(0)), *(one - np.float32(2) ** -np.arange(2, 24, dtype=np.float32))]
    x = np.concatenate([np.linspace(-0.9999, 0.9999, 100_001), ends, np.negative(ends)]).astype(np.float32)
    x = x[x != 0]
    np.testing.assert_allclose(np.asarray(jax.jit(inverse_erf)(x)), erfinv(x.astype(np.float64)), rtol=5e-7)


def test_slices_are_parts_of_one_tensor() -> None:
    full = RandomSource(3, 0.02).read(ROW, WHOLE)
    source = RandomSource(3, 0.02)
    rows = [(0, 5), (1000, 1030), (7, 1031), (9, 9)]
    columns = [(0, 6), (1, 4), (5, 6)]
    for (r0, r1), (c0, c1) in itertools.product(rows, columns):
        index = (slice(r0, r1), slice(c0, c1))
        assert torch.equal(source.read(ROW, index), full[index])


def test_order_and_other_rows_make_no_difference() -> None:
    other = matrix("lm_head.weight", ROW.dims, ROW.size)
    source = RandomSource(3, 0.02)
    first = source.read(ROW, WHOLE)
    assert (source.read(other, WHOLE) != first).float().mean() > 0.99
    assert torch.equal(source.read(ROW, WHOLE), first)


def test_seed_and_layer_change_every_number() -> None:
    layers = [matrix(f"model.layers.{i}.mlp.up_proj.weight", ROW.dims, ROW.size) for i in (1, 2, 11)]
    drawn = [RandomSource(seed, 0.02).read(layer, WHOLE) for seed in (1, 11) for layer in layers]
    for one, two in itertools.combinations(drawn, 2):
        assert (one != two).float().mean() > 0.99


def test_distribution() -> None:
    values = RandomSource(1, 0.05).read(matrix("w", ("mlp", "embed"), (3000, 301)), WHOLE)
    assert values.dtype == torch.float32
    assert values.mean().abs() < 3e-4 and abs(values.std().item() / 0.05 - 1) < 5e-3
    assert abs((values.abs() < 0.05).float().mean().item() - 0.6827) < 3e-3
    assert abs((values.abs() > 0.15).float().mean().item() - 0.0027) < 3e-4


def test_an_adapter_begins_as_pefts_does() -> None:
    """Both draw from within the root of 1 / inputs, evenly; B is zeros."""
    projection = matrix("model.layers.0.mlp.down_proj.weight", ("embed", "mlp"), (96, 3000))
    a, b = adapter_rows(projection, 64)
    ours, theirs = RandomSource(1, 0.02).read(a, WHOLE), torch.empty(a.size)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5, generator=torch.Generator().manual_seed(1))
    bound = 3000**-0.5
    for values in (ours, theirs):
        assert 0.999 * bound < values.abs().max() <= bound
        assert values.mean().abs() < 0.01 * bound
        assert abs(values.std().item() / bound - 3**-0.5) < 3e-3
        assert abs((values.abs() < bound / 4).float().mean().item() - 0.25) < 5e-3
    assert not RandomSource(1, 0.02).read(b, WHOLE).any()


def test_a_seed_means_the_same_numbers_after_an_upgrade() -> None:
    """To what another processor or compiler may round otherwise."""
    values = RandomSource(0, 0.02).read(ROW, WHOLE).flatten()[[0, 1, 1000, 6185]]
    expected = torch.tensor([-0.00467823399, 0.00156766223, 0.00293621467, -0.032789316])
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


def test_a_setting_of_jax_makes_no_difference() -> None:
    expected = RandomSource(0, 0.02).read(ROW, WHOLE)
    with jax.threefry_partitionable(False):
        assert torch.equal(RandomSource(0, 0.02).read(ROW, WHOLE), expected)


def test_norms_are_ones_and_biases_zeros() -> None:
    source = RandomSource(0, 0.02)
    assert torch.equal(source.read(norm_scale("n", 5), (slice(1, 4),)), torch.ones(3))
    assert torch.equal(source.read(bias("b", "heads", 5), (slice(None),)), torch.zeros(5))


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
