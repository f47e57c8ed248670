"""The decoder: plain PyTorch modules whose parameters carry Hugging Face's names and layouts.

Shapes: B batch, T tokens, D model, N heads, K kv heads, H head dim, F mlp, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tptrain.family import LayerKind, ModelFacts
from tptrain.models.attention import (
    AttentionCore,
    AttentionKind,
    CoreFactory,
    KVCache,
    PlainAttention,
    cache_mask,
    write_cache,
)
from tptrain.models.loss import LossChunks, mean_loss
from tptrain.models.marks import Marks
from tptrain.models.norms import RMSNorm
from tptrain.models.rope import inverse_frequencies, rotate, rotation


@dataclass
class LayerContext:
    """What every layer reads and none changes.

    cos, sin:  [B, T, 1, H] of the rotary embedding.
    attention: how queries, keys and values become attended values; knows the segments of the rows.
    positions: [B, T], where a cached layer writes its keys and values.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    attention: AttentionCore
    positions: torch.Tensor


class Attention(nn.Module):
    """Self-attention with grouped queries and rotary embedding."""

    def __init__(self, facts: ModelFacts, kind: LayerKind, marks: Marks):
        super().__init__()
        d, n, k, h = facts.hidden_size, facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim
        self.q_proj = nn.Linear(d, n * h, bias=facts.attention_bias)
        self.k_proj = nn.Linear(d, k * h, bias=facts.attention_bias)
        self.v_proj = nn.Linear(d, k * h, bias=facts.attention_bias)
        self.o_proj = nn.Linear(n * h, d, bias=facts.attention_bias)
        self.head_dim, self.marks = h, marks
        self.kind = AttentionKind(scale=h**-0.5, window=kind.window)

    def forward(
        self, x: torch.Tensor, context: LayerContext, cache: KVCache | None
    ) -> tuple[torch.Tensor, KVCache]:
        """x [B, T, D] -> [B, T, D], and the keys and values it attended to."""
        query = rotate(self._to_heads(x, self.q_proj), context.cos, context.sin)
        key = rotate(self._to_heads(x, self.k_proj), context.cos, context.sin)
        value = self._to_heads(x, self.v_proj)
        query = self.marks(query, "query", "act_batch", "act_tokens", "act_heads", "act_head_dim")
        key = self.marks(key, "key", "act_batch", "act_tokens", "act_kv_heads", "act_head_dim")
        value = self.marks(value, "value", "act_batch", "act_tokens", "act_kv_heads", "act_head_dim")
        if cache is not None:
            key = write_cache(cache.key, key, context.positions)
            value = write_cache(cache.value, value, context.positions)
        output = context.attention(query, key, value, self.kind)
        return self._from_heads(output, self.o_proj), KVCache(key, value)

    # Products with heads as a dim of their own: of a flat product the TPU's compiler lays the result out once
    # more before attention can read it.

    def _to_heads(self, x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """x [B, T, D] -> [B, T, heads, H]."""
        heads = torch.einsum("btd,nhd->btnh", x, linear.weight.unflatten(0, (-1, self.head_dim)))
        return heads if linear.bias is None else heads + linear.bias.unflatten(0, (-1, self.head_dim))

    def _from_heads(self, heads: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """heads [B, T, N, H] -> [B, T, D]."""
        x = torch.einsum("btnh,dnh->btd", heads, linear.weight.unflatten(1, (-1, self.head_dim)))
        return x if linear.bias is None else x + linear.bias


class MLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)), as in arXiv:2002.05202."""

    def __init__(self, facts: ModelFacts, marks: Marks):
        super().__init__()
        d, f = facts.hidden_size, facts.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=facts.mlp_bias)
        self.up_proj = nn.Linear(d, f, bias=facts.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=facts.mlp_bias)
        self.marks = marks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.marks(self.gate_proj(x), "gate", "act_batch", "act_tokens", "act_mlp")
        up = self.marks(self.up_proj(x), "up", "act_batch", "act_tokens", "act_mlp")
        hidden = self.marks(F.silu(gate) * up, "mlp_hidden", "act_batch", "act_tokens", "act_mlp")
        return self.down_proj(hidden)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each on a normed input and added to the residual stream."""

    def __init__(self, facts: ModelFacts, kind: LayerKind, marks: Marks):
        super().__init__()
        self.self_attn = Attention(facts, kind, marks)
        self.mlp = MLP(facts, marks)
        self.input_layernorm = RMSNorm(facts.hidden_size, facts.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(facts.hidden_size, facts.rms_norm_eps)
        self.marks = marks

    def forward(
        self, x: torch.Tensor, context: LayerContext, cache: KVCache | None = None
    ) -> tuple[torch.Tensor, KVCache]:
        attended, cache = self.self_attn(
            self._mark(self.input_layernorm(x), "attention_input"), context, cache
        )
        x = self._mark(x + attended, "after_attention")
        x = x + self.mlp(self._mark(self.post_attention_layernorm(x), "mlp_input"))
        return self._mark(x, "after_mlp"), cache

    def _mark(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.marks(x, name, "act_batch", "act_tokens", "act_embed")


class LayerList(nn.ModuleList):
    """The layers, run one after the other. A backend may put a scan in its place."""

    def forward(
        self, x: torch.Tensor, context: LayerContext, caches: Sequence[KVCache] | None = None
    ) -> tuple[torch.Tensor, list[KVCache]]:
        written = []
        for index, layer in enumerate(self):
            x, cache = layer(x, context, caches[index] if caches is not None else None)
            written.append(cache)
        return x, written


class Body(nn.Module):
    """Embedding, layers and final norm: what Hugging Face names `model`."""

    def __init__(self, facts: ModelFacts, padded_vocab: int, marks: Marks):
        super().__init__()
        self.embed_tokens = nn.Embedding(padded_vocab, facts.hidden_size)
        period = facts.layer_period
        kinds = [period[i % len(period)] for i in range(facts.num_hidden_layers)]
        self.layers: nn.Module = LayerList(Block(facts, kind, marks) for kind in kinds)
        self.norm = RMSNorm(facts.hidden_size, facts.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model. Build it on `meta` and run it with `torch.func.functional_call`.

    padded_vocab: rows of the embedding and of the head in memory, at least facts.vocab_size; the logits of
    the padding are the lowest finite number, so no probability ever falls on it.
    loss_chunks:  how `mean_loss` walks over a batch; None: all its logits at once.
    """

    def __init__(
        self, facts: ModelFacts, padded_vocab: int | None = None, loss_chunks: LossChunks | None = None
    ):
        super().__init__()
        self.facts = facts
        self.padded_vocab = padded_vocab or facts.vocab_size
        self.loss_chunks = loss_chunks
        self.marks = Marks()
        # How attention without caches is computed; a backend may put a kernel here.
        self.attention_core: CoreFactory = partial(PlainAttention.of_segments, marks=self.marks)
        self.model = Body(facts, self.padded_vocab, self.marks)
        if not facts.tie_word_embeddings:
            self.lm_head = nn.Linear(facts.hidden_size, self.padded_vocab, bias=False)
        # The one tensor that is neither a parameter nor computed from the batch.
        self.rope_frequencies: torch.Tensor
        self.register_buffer("rope_frequencies", torch.empty(facts.head_dim // 2), persistent=False)

    def constants(self) -> dict[str, torch.Tensor]:
        """Name -> host tensor of what the model needs beside its parameters."""
        return {"rope_frequencies": inverse_frequencies(self.facts.rope, self.facts.head_dim)}

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, segment_ids: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, T, V] in the format of the parameters; all inputs are integers [B, T]."""
        return self.logits(self.hidden(tokens, positions, segment_ids))

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, segment_ids: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the final norm; all inputs are integers [B, T]."""
        attention = self.attention_core(segment_ids, self._windows())
        return self._run(tokens, positions, attention, None)[0]

    def mean_loss(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        segment_ids: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        total: torch.Tensor,
    ) -> torch.Tensor:
        """Sum over tokens of weight x negative log-likelihood, over the scalar `total`.

        The logits of all tokens never exist together unless `loss_chunks` is None.
        """
        hidden = self.hidden(tokens, positions, segment_ids)
        chunks = self.loss_chunks or LossChunks(tokens.shape[1])
        head = self.head_weight
        return mean_loss(hidden, head, targets, weights, total, self.project, self.marks, chunks)

    def forward_cached(
        self, tokens: torch.Tensor, positions: torch.Tensor, caches: Sequence[KVCache]
    ) -> tuple[torch.Tensor, Sequence[KVCache]]:
        """`hidden` against caches: returns hidden states [B, T, D] after the final norm, and new caches."""
        length = caches[0].key.shape[-3]
        masks = {window: cache_mask(positions, length, window) for window in self._windows()}
        return self._run(tokens, positions, PlainAttention(masks, self.marks), caches)

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionCore,
        caches: Sequence[KVCache] | None,
    ) -> tuple[torch.Tensor, Sequence[KVCache]]:
        x = self.marks(self.model.embed_tokens(tokens), "embedded", "act_batch", "act_tokens", "act_embed")
        cos, sin = rotation(positions, self.rope_frequencies, x.dtype)
        x, caches = self.model.layers(x, LayerContext(cos, sin, attention, positions), caches)
        return self.model.norm(x), caches

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D]: from hidden states to logits."""
        head = self.model.embed_tokens if self.facts.tie_word_embeddings else self.lm_head
        return head.weight

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        return self.project(x, self.head_weight)

    def project(self, x: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
        """The same with a head [V, D] of the caller's."""
        logits = F.linear(x, head_weight)
        if logits.ndim == 3:
            logits = self.marks(logits, "logits", "act_batch", "act_tokens", "act_vocab")
        if self.padded_vocab == self.facts.vocab_size:
            return logits
        is_real = torch.arange(self.padded_vocab, device=logits.device) < self.facts.vocab_size
        return torch.where(is_real, logits, torch.finfo(logits.dtype).min)

    def _windows(self) -> set[int | None]:
        return {kind.window for kind in self.facts.layer_period}
