"""The Flax decoders of every family, layer by layer and in loops, give the logits of transformers."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from tests import families, small
from tests.flax.oracle import flax_logits, relative
from tptrain.family import facts_from_config
from tptrain.jaxside.flax_decoder import FlaxDecoder
from tptrain.jaxside.flax_scan import Passes, ScannedDecoder, stack_layers

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", families.CONFIGS)
def test_logits_equal_transformers(name: str) -> None:
    facts, rows = facts_from_config(families.CONFIGS[name]), small.packed_rows()
    model = families.model_of(name)
    params = {n: jnp.asarray(t.numpy()) for n, t in small.weights_of(model).items()}
    ours = flax_logits(FlaxDecoder(facts, params), rows)[rows.real]
    theirs = families.reference_logits(model, rows).numpy()[rows.real]
    assert relative(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe"])
def test_loops_over_periods_give_the_same(name: str) -> None:
    """Several loops, of one and of several layers, with experts and without."""
    facts, rows = facts_from_config(families.CONFIGS[name]), small.packed_rows()
    params = {n: jnp.asarray(t.numpy()) for n, t in small.weights_of(families.model_of(name)).items()}
    scanned = ScannedDecoder(facts, stack_layers(facts, params), Passes())
    hidden = scanned.model(rows.tokens, rows.positions, rows.segment_ids)
    whole = FlaxDecoder(facts, params).model(rows.tokens, rows.positions, rows.segment_ids)
    assert relative(hidden[rows.real], whole[rows.real]) <= TOLERANCE
