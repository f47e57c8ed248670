"""The Flax decoder's logits, loss and gradients equal the torch decoder's; any feature broken shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests import small
from tests.flax.oracle import (
    CONFIGS,
    ROWS,
    WINDOWS,
    Arrays,
    facts_of,
    flax_decoder,
    flax_logits,
    gap,
    params_of,
    relative,
    torch_decoder,
    torch_logits,
    weights_of,
)
from tptrain.family import LayerKind, RopeFacts, facts_from_config
from tptrain.jaxside import flax_layers
from tptrain.jaxside.flax_decoder import loss
from tptrain.models.rope import inverse_frequencies
from tptrain.train.step import BATCH_NAMES, loss_and_gradients

TOLERANCE, BROKEN = 1e-5, 1e-3


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_equal_the_torch_decoders(config: str, rows: str) -> None:
    assert gap(config, rows) <= TOLERANCE


@pytest.mark.parametrize("config", ["llama3", "biases"])
def test_logits_in_float64_equal_the_torch_decoders(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 would call rounding is none here; but for the frequencies, see below."""
    monkeypatch.setattr(flax_layers, "inverse_frequencies", lambda *of: inverse_frequencies(*of).numpy())
    with jax.experimental.enable_x64():
        assert gap(config, "packed", format="float64") <= 1e-12


def test_logits_in_bfloat16_are_rounded_where_the_torch_decoders_are() -> None:
    """What is left is the order of sums; logits are rounded to 1 in 256."""
    assert gap("llama3", "packed", format="bfloat16") <= 0.03


@pytest.mark.parametrize("rows", ROWS)
def test_windows_equal_the_torch_decoders(rows: str) -> None:
    assert gap("llama3", rows, period=WINDOWS) <= TOLERANCE


@pytest.mark.parametrize("rope", small.ROPES)
@pytest.mark.parametrize(("theta", "head_dim"), [(10000.0, 10), (500000.0, 128), (500000.0, 64), (1e6, 96)])
def test_frequencies_equal_torchs_but_for_the_last_bit(rope: str, theta: float, head_dim: int) -> None:
    facts = dataclasses.replace(facts_from_config(small.small_config(rope)).rope, theta=theta)
    theirs = inverse_frequencies(facts, head_dim).numpy()
    ours = flax_layers.inverse_frequencies(facts, head_dim)
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == (head_dim // 2,)
    np.testing.assert_allclose(ours, theirs, rtol=3e-7, atol=0)


def test_a_token_outside_the_vocabulary_gives_nan() -> None:
    decoder, rows = flax_decoder("tied"), ROWS["packed"]
    tokens = rows.tokens.copy()
    tokens[1, 5], tokens[2, 0] = small.VOCAB, -1
    logits = flax_logits(decoder, dataclasses.replace(rows, tokens=tokens))
    assert np.isnan(logits[1, 5:]).all() and np.isnan(logits[2, 0]).all()
    assert np.isfinite(logits[0]).all()


# Each breaks one feature.


def with_interleaved_groups(params: Arrays) -> Arrays:
    """Head n reads kv head n % K instead of n // G: heads in another order, and back after attention."""
    facts = facts_of("default")
    n, k, h = facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim
    heads = np.arange(n).reshape(n // k, k).T.ravel()
    rows = (heads[:, None] * h + np.arange(h)).ravel()
    mixed = dict(params)
    for name, array in params.items():
        if "q_proj" in name:
            mixed[name] = array[rows]
        elif "o_proj" in name:
            mixed[name] = array[:, rows]
    return mixed


def test_interleaved_groups_show() -> None:
    assert gap("default", "padded", with_interleaved_groups(params_of("default"))) >= BROKEN


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ("linear", {"rope": RopeFacts("default", 10000.0)}),
        ("llama3", {"rope": RopeFacts("default", 10000.0)}),
        ("llama3", {"rope": RopeFacts("linear", 10000.0, factor=8.0)}),
        ("default", {"rope": RopeFacts("default", 500000.0)}),
        ("default", {"rms_norm_eps": 1e-6}),
        ("default", {"layer_period": (LayerKind(4),)}),
        ("default", {"layer_period": (LayerKind(), LayerKind(4))}),
    ],
)
def test_wrong_facts_show(config: str, facts: dict[str, Any]) -> None:
    assert gap(config, "packed", **facts) >= BROKEN


def test_windows_in_another_order_show() -> None:
    assert gap("llama3", "packed", period=WINDOWS, layer_period=WINDOWS[::-1]) >= BROKEN


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_forgotten_bias_shows(kind: str) -> None:
    part, facts = {
        "attention": (".self_attn.", ("qkv_bias", "attention_output_bias")),
        "mlp": (".mlp.", ("mlp_bias",)),
    }[kind]
    params = params_of("biases")
    kept = {n: a for n, a in params.items() if not (n.endswith(".bias") and part in n)}
    assert len(kept) < len(params)
    assert gap("biases", "packed", kept, **dict.fromkeys(facts, False)) >= BROKEN


@pytest.mark.parametrize("field", ["segment_ids", "positions"])
@pytest.mark.parametrize("rows", ROWS)
def test_ignored_inputs_show(field: str, rows: str) -> None:
    """One segment, or one position, everywhere."""
    given = ROWS[rows]
    ignored = dataclasses.replace(given, **{field: np.ones_like(given.tokens)})
    ours = flax_logits(flax_decoder("default"), ignored)[given.real]
    assert relative(ours, torch_logits("default", rows)) >= BROKEN


def without_causality(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flax_layers, "causal_mask", lambda ids, window: ids[:, :, None] == ids[:, None, :])


def without_attention_scale(patch: pytest.MonkeyPatch) -> None:
    original = flax_layers.attention_weights
    patch.setattr(
        flax_layers, "attention_weights", lambda scores, mask, scale, cap: original(scores, mask, 1.0, cap)
    )


def without_norm_scale(patch: pytest.MonkeyPatch) -> None:
    original = flax_layers.RMSNorm.__call__
    patch.setattr(flax_layers.RMSNorm, "__call__", lambda self, x: original(self, x) / self.weight[...])


@pytest.mark.parametrize("mutate", [without_causality, without_attention_scale, without_norm_scale])
def test_a_broken_feature_shows(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    assert gap("default", "padded") >= BROKEN


# Loss and gradients.


def test_loss_and_gradients_equal_the_torch_steps() -> None:
    """Of two micro-batches and a tied model, whose embedding has gradients from both of its uses."""
    batch, model = small.train_batch(1, accumulation=2), torch_decoder("tied")
    working = {name: tensor.clone().requires_grad_(True) for name, tensor in weights_of("tied").items()}
    inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
    theirs, _, gradients = loss_and_gradients(model, {**working, **model.constants()}, working, inputs)
    ours, state = nnx.jit(nnx.value_and_grad(loss))(flax_decoder("tied"), batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    found = {".".join(map(str, path)): array for path, array in nnx.to_flat_state(nnx.pure(state))}
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        assert relative(found[name], gradient.numpy()) <= TOLERANCE, name


def test_micro_batches_share_one_count() -> None:
    batch, decoder = small.train_batch(1, accumulation=2), flax_decoder("llama3")
    assert set(batch) == set(BATCH_NAMES)
    parts = [loss(decoder, {n: a[micro] for n, a in batch.items()}).item() for micro in range(2)]
    counts = batch["weights"].sum((1, 2))
    whole = loss(decoder, batch)
    assert whole.item() == pytest.approx(np.average(parts, weights=counts), rel=1e-6)
    assert abs(np.mean(parts) - whole.item()) > 1e-4 * whole.item(), "a mean of means would differ"
    nothing = loss(decoder, {**batch, "weights": np.zeros_like(batch["weights"])})
    assert nothing == 0 and nothing.dtype == whole.dtype == jnp.float32
