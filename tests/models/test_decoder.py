"""Logits of the decoder equal transformers'; with any feature broken, the same check fails 100 times over.

Every case is compared at its real (not padded) positions, in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests import small
from tptrain.family import ModelFacts, RopeFacts, facts_from_config
from tptrain.models import attention, decoder, norms
from tptrain.models.decoder import Decoder
from tptrain.models.rope import inverse_frequencies, rotation

TOLERANCE, BROKEN = 1e-5, 1e-3

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": small.small_config(),
    "linear": small.small_config("linear"),
    "llama3": small.small_config("llama3"),
    "multi_head": small.small_config(num_key_value_heads=24),
    "one_kv_head": small.small_config(num_key_value_heads=1),
    "tied": small.small_config("llama3", tie_word_embeddings=True),
    "biases": small.small_config(attention_bias=True, mlp_bias=True),
}
ROWS = {"padded": small.padded_rows(), "packed": small.packed_rows()}


@cache
def model_of(config: str) -> Any:
    return small.reference_model(CONFIGS[config])


@cache
def reference(config: str, rows: str) -> torch.Tensor:
    return small.reference_logits(model_of(config), ROWS[rows])


def logits_of(
    facts: ModelFacts, weights: dict[str, torch.Tensor], rows: small.Rows, padded: int | None = None
) -> torch.Tensor:
    with torch.device("meta"):
        model = Decoder(facts, padded)
    with torch.no_grad():
        return functional_call(model, {**weights, **model.constants()}, rows.tensors())


def gap(config: str, rows: str, weights: dict[str, torch.Tensor] | None = None, **facts: Any) -> float:
    """How far our logits are from transformers' at the real positions, relative to the largest one."""
    changed = dataclasses.replace(facts_from_config(CONFIGS[config]), **facts)
    real = torch.from_numpy(ROWS[rows].real)
    ours = logits_of(changed, weights or small.weights_of(model_of(config)), ROWS[rows])
    return small.difference(ours[real], reference(config, rows)[real])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_equal_transformers(config: str, rows: str) -> None:
    assert gap(config, rows) <= TOLERANCE


def test_a_plain_padded_batch_equals_transformers_own_masks() -> None:
    """The reference's mask is made by transformers itself here, from the mask of a padded batch."""
    rows, model = ROWS["padded"], model_of("llama3")
    mask = torch.from_numpy(rows.real.astype(np.int64))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        tokens = torch.from_numpy(rows.tokens).long()
        theirs = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    ours = logits_of(facts_from_config(CONFIGS["llama3"]), small.weights_of(model), rows)
    assert small.difference(ours[mask > 0], theirs[mask > 0]) <= TOLERANCE


def test_positions_that_start_late_equal_transformers() -> None:
    """A row whose positions lie far beyond the context that RoPE was scaled from."""
    rows = small.Rows(ROWS["padded"].tokens, ROWS["padded"].positions + 400, ROWS["padded"].segment_ids)
    model, real = model_of("llama3"), torch.from_numpy(rows.real)
    theirs = small.reference_logits(model, rows)
    ours = logits_of(facts_from_config(CONFIGS["llama3"]), small.weights_of(model), rows)
    assert small.difference(ours[real], theirs[real]) <= TOLERANCE


def log_probabilities_gap(config: str) -> float:
    """How far log-probabilities are from transformers', with a vocabulary padded by random rows."""
    padded = small.VOCAB + 121
    weights = dict(small.weights_of(model_of(config)))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            extra = torch.randn(padded - small.VOCAB, weights[name].shape[1]) * small.WEIGHT_STD
            weights[name] = torch.cat([weights[name], extra])
    ours = logits_of(facts_from_config(CONFIGS[config]), weights, ROWS["packed"], padded)
    theirs = reference(config, "packed")
    assert ours.shape[-1] == padded
    logs = ours.log_softmax(-1)[..., : small.VOCAB]
    return ((logs - theirs.log_softmax(-1)).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("config", ["grouped", "tied"])
def test_no_probability_falls_on_a_padded_vocabulary(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert log_probabilities_gap(config) <= TOLERANCE
    # Without the mask: the decoder believes that all padded rows are real.
    original = Decoder.logits

    def unmasked(self: Decoder, x: torch.Tensor) -> torch.Tensor:
        self.facts = dataclasses.replace(self.facts, vocab_size=self.padded_vocab)
        return original(self, x)

    monkeypatch.setattr(Decoder, "logits", unmasked)
    assert log_probabilities_gap(config) >= BROKEN


# Each takes away one feature of the decoder.


def without_rope_scaling(patch: pytest.MonkeyPatch) -> None:
    def unscaled(rope: RopeFacts, head_dim: int) -> torch.Tensor:
        return inverse_frequencies(RopeFacts("default", rope.theta), head_dim)

    patch.setattr(decoder, "inverse_frequencies", unscaled)


def with_interleaved_groups(patch: pytest.MonkeyPatch) -> None:
    """Head n reads kv head n % K instead of n // G."""
    original_scores, original_values = attention.attention_scores, attention.weighted_values

    def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        grouped = query.unflatten(2, (-1, key.shape[2])).transpose(2, 3).flatten(2, 3)
        return original_scores(grouped, key)

    def values(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mixed = original_values(weights, value)
        return mixed.unflatten(2, (value.shape[2], -1)).transpose(2, 3).flatten(2, 3)

    patch.setattr(attention, "attention_scores", scores)
    patch.setattr(attention, "weighted_values", values)


def without_segments(patch: pytest.MonkeyPatch) -> None:
    original = attention.causal_mask
    patch.setattr(attention, "causal_mask", lambda ids, window: original(torch.ones_like(ids), window))


def without_causality(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "causal_mask", lambda ids, window: ids[:, :, None] == ids[:, None, :])


def without_positions(patch: pytest.MonkeyPatch) -> None:
    """RoPE sees one position everywhere. (Only distances matter to it, so an offset alone would not show.)"""

    def standing(positions: torch.Tensor, *others: Any) -> Any:
        return rotation(torch.zeros_like(positions), *others)

    patch.setattr(decoder, "rotation", standing)


def with_another_norm_epsilon(patch: pytest.MonkeyPatch) -> None:
    original = norms.RMSNorm.__init__
    patch.setattr(norms.RMSNorm, "__init__", lambda self, size, eps, scale: original(self, size, 1e-6, scale))


def without_norm_scale(patch: pytest.MonkeyPatch) -> None:
    original = norms.RMSNorm.forward
    patch.setattr(norms.RMSNorm, "forward", lambda self, x: original(self, x) / self.weight)


def without_mean_of_squares(patch: pytest.MonkeyPatch) -> None:
    """A layer norm's variance in the place of the mean of squares."""

    def centred(self: norms.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.var(-1, keepdim=True) + self.eps)

    patch.setattr(norms.RMSNorm, "forward", centred)


def without_attention_scale(patch: pytest.MonkeyPatch) -> None:
    original = attention.attention_weights
    patch.setattr(
        attention, "attention_weights", lambda scores, mask, scale, cap: original(scores, mask, 1.0, cap)
    )


MUTATIONS: list[tuple[str, str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("linear", "padded", without_rope_scaling),
    ("llama3", "padded", without_rope_scaling),
    ("grouped", "padded", with_interleaved_groups),
    ("grouped", "packed", without_segments),
    ("grouped", "padded", without_segments),
    ("grouped", "packed", without_positions),
    ("grouped", "padded", without_causality),
    ("grouped", "padded", with_another_norm_epsilon),
    ("grouped", "padded", without_norm_scale),
    ("grouped", "padded", without_mean_of_squares),
    ("grouped", "padded", without_attention_scale),
]


@pytest.mark.parametrize(("config", "rows", "mutate"), MUTATIONS)
def test_a_broken_feature_shows(
    config: str, rows: str, mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    assert gap(config, rows) >= BROKEN


def test_a_broken_tie_shows() -> None:
    """The head of a tied model as a random matrix of its own."""
    weights = small.weights_of(model_of("tied"))
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"]) * small.WEIGHT_STD
    assert gap("tied", "packed", weights, tie_word_embeddings=False) >= BROKEN


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_forgotten_bias_shows(kind: str) -> None:
    part, facts = {
        "attention": ("self_attn", ("qkv_bias", "attention_output_bias")),
        "mlp": ("mlp", ("mlp_bias",)),
    }[kind]
    weights = small.weights_of(model_of("biases"))
    kept = {n: t for n, t in weights.items() if not (n.endswith(".bias") and f".{part}." in n)}
    assert len(kept) < len(weights)
    assert gap("biases", "packed", kept, **dict.fromkeys(facts, False)) >= BROKEN


# Masks and the cache against loops.


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_causal_mask_equals_a_loop(window: int | None) -> None:
    ids = small.packed_rows(17 + 15).segment_ids
    mask = attention.causal_mask(torch.from_numpy(ids), window)
    assert mask.shape == (*ids.shape, ids.shape[1]) and mask.dtype == torch.bool
    for (row, query, key), allowed in np.ndenumerate(mask.numpy()):
        near = query >= key and (window is None or query - key < window)
        assert allowed == (near and ids[row, query] == ids[row, key]), (row, query, key)
    assert mask.any(-1).all(), "a query without a key would make a softmax of nothing"


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_cache_mask_equals_a_loop(window: int | None) -> None:
    positions = torch.tensor([[3, 4, 5], [0, 1, 2], [8, 9, 10]])
    mask = attention.cache_mask(positions, 11, window)
    assert mask.shape == (3, 3, 11)
    for (row, query, slot), allowed in np.ndenumerate(mask.numpy()):
        back = positions[row, query].item() - slot
        assert allowed == (back >= 0 and (window is None or back < window)), (row, query, slot)


def test_write_cache_puts_each_row_at_its_own_position() -> None:
    random = torch.Generator().manual_seed(0)
    cache, prompt = torch.randn(3, 9, 2, 5, generator=random), torch.randn(3, 4, 2, 5, generator=random)
    expected = cache.clone()
    expected[:, :4] = prompt
    given = cache.clone()
    written = attention.write_cache(given, prompt, torch.arange(4).expand(3, 4))
    assert torch.equal(written, expected) and torch.equal(given, cache)
    for positions in ([4, 2, 8], [5, 3, 0]):
        token = torch.randn(3, 1, 2, 5, generator=random)
        for row, position in enumerate(positions):
            expected[row, position] = token[row, 0]
        written = attention.write_cache(written, token, torch.tensor(positions)[:, None])
        assert torch.equal(written, expected)


@pytest.mark.parametrize("rope", small.ROPES)
def test_rotation_equals_transformers_at_long_positions(rope: str) -> None:
    """Bit for bit: at position 100,000 the last bit of a frequency moves an angle by a hundredth."""
    config = model_of({"default": "grouped"}.get(rope, rope)).config
    positions = torch.tensor([[0, 1, 17, 511, 4095, 32767, 100000, 131071]])
    theirs = LlamaRotaryEmbedding(config=config)(torch.zeros(1), positions)
    facts = facts_from_config(small.small_config(rope))
    ours = rotation(positions, inverse_frequencies(facts.rope, facts.head_dim), torch.float32)
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine[:, :, 0], expected)
