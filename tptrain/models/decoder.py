"""The decoder: plain PyTorch modules whose parameters carry Hugging Face's names and layouts.

Shapes: B batch, T tokens, D model, N heads, K kv heads, H head dim, F mlp, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tptrain.family import LayerKind, ModelFacts, RopeFacts
from tptrain.family.facts import Activation
from tptrain.models.attention import (
    AttentionCore,
    CoreFactory,
    KVCache,
    PlainAttention,
    cache_mask,
    soft_capped,
    write_cache,
)
from tptrain.models.experts import ExpertsCore, MixtureOfExperts, every_expert, router_loss
from tptrain.models.linear import Linear
from tptrain.models.loss import LossChunks, Projection, mean_loss, token_scores
from tptrain.models.marks import Marks
from tptrain.models.norms import RMSNorm
from tptrain.models.rope import inverse_frequencies, rotate, rotation


@dataclass
class LayerContext:
    """What every layer reads and none changes.

    rotations: cosine and sine of every rotary embedding of the model, each [B, T, 1, H].
    attention: how queries, keys and values become attended values; knows the segments of the rows.
    positions: [B, T], where a cached layer writes its keys and values.
    experts:   what chosen experts make of their tokens.
    counted:   [B, T], 1 for the tokens of the router's loss and 0 for others; None where it is not asked for.
    """

    rotations: Mapping[RopeFacts, tuple[torch.Tensor, torch.Tensor]]
    attention: AttentionCore
    positions: torch.Tensor
    experts: ExpertsCore
    counted: torch.Tensor | None = None


class LayerResult(NamedTuple):
    """x [B, T, D]; the keys and values of one or of several layers; the router's sums, [2, E] for each layer
    with experts (perhaps stacked), where they are asked for."""

    x: torch.Tensor
    caches: list[KVCache]
    router_sums: list[torch.Tensor]


class Attention(nn.Module):
    """Self-attention with grouped queries and rotary embedding; queries and keys may be normed before it."""

    def __init__(self, facts: ModelFacts, kind: LayerKind, marks: Marks):
        super().__init__()
        d, n, k, h = facts.hidden_size, facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim
        self.q_proj = Linear(d, n * h, facts.qkv_bias, marks)
        self.k_proj = Linear(d, k * h, facts.qkv_bias, marks)
        self.v_proj = Linear(d, k * h, facts.qkv_bias, marks)
        self.o_proj = Linear(n * h, d, facts.attention_output_bias, marks)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if facts.qk_norm != "none":
            of_head = facts.qk_norm == "head"
            self.q_norm = _norm(facts, h if of_head else n * h)
            self.k_norm = _norm(facts, h if of_head else k * h)
        self.head_dim, self.marks = h, marks
        self.kind, self.rope = facts.attention_of(kind), facts.rope_of(kind)

    def forward(
        self, x: torch.Tensor, context: LayerContext, cache: KVCache | None
    ) -> tuple[torch.Tensor, KVCache]:
        """x [B, T, D] -> [B, T, D], and the keys and values it attended to."""
        cos, sin = context.rotations[self.rope]
        query = rotate(self._normed(self.q_proj.to_heads(x, self.head_dim), self.q_norm), cos, sin)
        key = rotate(self._normed(self.k_proj.to_heads(x, self.head_dim), self.k_norm), cos, sin)
        value = self.v_proj.to_heads(x, self.head_dim)
        query = self.marks(query, "query", "act_batch", "act_tokens", "act_heads", "act_head_dim")
        key = self.marks(key, "key", "act_batch", "act_tokens", "act_kv_heads", "act_head_dim")
        value = self.marks(value, "value", "act_batch", "act_tokens", "act_kv_heads", "act_head_dim")
        if cache is not None:
            key = write_cache(cache.key, key, context.positions)
            value = write_cache(cache.value, value, context.positions)
        output = context.attention(query, key, value, self.kind)
        return self.o_proj.from_heads(output), KVCache(key, value)

    @staticmethod
    def _normed(heads: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        """heads [B, T, heads, H] normed one by one, or all of a token together: the norm's size tells."""
        if norm is None:
            return heads
        if norm.weight.shape[0] == heads.shape[-1]:
            return norm(heads)
        return norm(heads.flatten(2)).view_as(heads)


def _norm(facts: ModelFacts, size: int) -> RMSNorm:
    return RMSNorm(size, facts.rms_norm_eps, facts.norm_scale)


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class MLP(nn.Module):
    """Gated MLP: down(activation(gate(x)) * up(x)), as in arXiv:2002.05202."""

    def __init__(self, facts: ModelFacts, marks: Marks):
        super().__init__()
        d, f = facts.hidden_size, facts.intermediate_size
        self.gate_proj = Linear(d, f, facts.mlp_bias, marks)
        self.up_proj = Linear(d, f, facts.mlp_bias, marks)
        self.down_proj = Linear(f, d, facts.mlp_bias, marks)
        self.activation, self.marks = ACTIVATIONS[facts.activation], marks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        gate = self.marks(self.gate_proj(x), "gate", "act_batch", "act_tokens", "act_mlp")
        up = self.marks(self.up_proj(x), "up", "act_batch", "act_tokens", "act_mlp")
        hidden = self.marks(self.activation(gate) * up, "mlp_hidden", "act_batch", "act_tokens", "act_mlp")
        return self.down_proj(hidden)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each added to the residual stream, with norms around them.

    Which of their inputs and outputs are normed, and what the norms are called, is the family's choice.
    """

    def __init__(self, facts: ModelFacts, kind: LayerKind, marks: Marks):
        super().__init__()
        self.self_attn = Attention(facts, kind, marks)
        self.mlp: nn.Module
        if kind.has_experts:
            assert facts.experts is not None, "a layer with experts is in a model that says how many"
            activation = ACTIVATIONS[facts.activation]
            self.mlp = MixtureOfExperts(facts.hidden_size, facts.experts, activation, marks)
        else:
            self.mlp = MLP(facts, marks)
        self.norms = facts.block_norm_names
        for name in self.norms:
            setattr(self, name, _norm(facts, facts.hidden_size))
        self.marks = marks

    def forward(self, x: torch.Tensor, context: LayerContext, cache: KVCache | None = None) -> LayerResult:
        given = self._mark(self._normed(x, self.norms.attention_input), "attention_input")
        attended, cache = self.self_attn(given, context, cache)
        x = self._mark(x + self._normed(attended, self.norms.attention_output), "after_attention")
        given = self._mark(self._normed(x, self.norms.mlp_input), "mlp_input")
        sums: torch.Tensor | None = None
        if isinstance(self.mlp, MixtureOfExperts):
            output, sums = self.mlp(given, context.experts, context.counted)
        else:
            output = self.mlp(given)
        x = self._mark(x + self._normed(output, self.norms.mlp_output), "after_mlp")
        return LayerResult(x, [cache], [] if sums is None else [sums])

    def _normed(self, x: torch.Tensor, norm: str | None) -> torch.Tensor:
        return x if norm is None else getattr(self, norm)(x)

    def _mark(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.marks(x, name, "act_batch", "act_tokens", "act_embed")


class LayerList(nn.ModuleList):
    """The layers, run one after the other. A backend may put a scan in its place."""

    def forward(
        self, x: torch.Tensor, context: LayerContext, caches: Sequence[KVCache] | None = None
    ) -> LayerResult:
        written, sums = list[KVCache](), list[torch.Tensor]()
        for index, layer in enumerate(self):
            x, cache, more = layer(x, context, caches[index] if caches is not None else None)
            written, sums = written + cache, sums + more
        return LayerResult(x, written, sums)


class Body(nn.Module):
    """Embedding, layers and final norm: what Hugging Face names `model`."""

    def __init__(self, facts: ModelFacts, padded_vocab: int, marks: Marks):
        super().__init__()
        self.embed_tokens = nn.Embedding(padded_vocab, facts.hidden_size)
        self.layers: nn.Module = LayerList(Block(facts, kind, marks) for kind in facts.layer_kinds)
        self.norm = _norm(facts, facts.hidden_size)


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
        # And how chosen experts compute their tokens.
        self.experts_core: ExpertsCore = partial(every_expert, marks=self.marks)
        self.model = Body(facts, self.padded_vocab, self.marks)
        if not facts.tie_word_embeddings:
            self.lm_head = nn.Linear(facts.hidden_size, self.padded_vocab, bias=False)
        # The one tensor that is neither a parameter nor computed from the batch.
        self.rope_frequencies: torch.Tensor
        shape = (len(facts.ropes), facts.head_dim // 2)
        self.register_buffer("rope_frequencies", torch.empty(shape), persistent=False)

    def constants(self) -> dict[str, torch.Tensor]:
        """Name -> host tensor of what the model needs beside its parameters."""
        frequencies = [inverse_frequencies(rope, self.facts.head_dim) for rope in self.facts.ropes]
        return {"rope_frequencies": torch.stack(frequencies)}

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, segment_ids: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, T, V] in the format of the parameters; all inputs are integers [B, T]."""
        return self.logits(self.hidden(tokens, positions, segment_ids))

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, segment_ids: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the final norm; all inputs are integers [B, T]."""
        attention = self.attention_core(segment_ids, self.facts.windows)
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

        With `router_loss_coef`, that much of the router's loss over all real tokens is added, times the part
        that these rows have in `total`: of a batch in micro-batches it is the mean, by counted tokens.

        The logits of all tokens never exist together unless `loss_chunks` is None.
        """
        has_router_loss = self.facts.experts is not None and self.facts.experts.router_loss_coef > 0
        counted = (segment_ids > 0).to(weights.dtype) if has_router_loss else None
        attention = self.attention_core(segment_ids, self.facts.windows)
        hidden, _, router_sums = self._run(tokens, positions, attention, None, counted)
        head, projection, chunks = self._head(tokens)
        loss = mean_loss(hidden, head, targets, weights, total, projection, self.marks, chunks)
        if counted is None:
            return loss
        return loss + self._router_loss(router_sums, counted) * (weights.sum() / total).to(loss.dtype)

    def token_scores(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        segment_ids: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """[2]: sums over tokens of weight x negative log-likelihood, and of weight where the target is the
        likeliest token; logits are held as in `mean_loss`.

        Without a router's loss, which is of a batch and not of a token.
        """
        hidden = self.hidden(tokens, positions, segment_ids)
        head, projection, chunks = self._head(tokens)
        return token_scores(hidden, head, targets, weights, projection, self.marks, chunks)

    def _head(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Projection, LossChunks]:
        """What leads from hidden states to logits, and how a loss walks over these rows."""
        projection = Projection(self.project, self.facts.logit_soft_cap)
        return self.head_weight, projection, self.loss_chunks or LossChunks(tokens.shape[1])

    def _router_loss(self, router_sums: list[torch.Tensor], counted: torch.Tensor) -> torch.Tensor:
        assert self.facts.experts is not None, "asked for where there are experts"
        layers = [sums.reshape(-1, *sums.shape[-2:]) for sums in router_sums]
        count = sum(len(each) for each in layers)
        total = torch.stack([each.sum(0) for each in layers]).sum(0)
        return self.facts.experts.router_loss_coef * router_loss(total, counted.sum() * count)

    def forward_cached(
        self, tokens: torch.Tensor, positions: torch.Tensor, caches: Sequence[KVCache]
    ) -> tuple[torch.Tensor, Sequence[KVCache]]:
        """`hidden` against caches: returns hidden states [B, T, D] after the final norm, and new caches."""
        length = caches[0].key.shape[-3]
        masks = {window: cache_mask(positions, length, window) for window in self.facts.windows}
        result = self._run(tokens, positions, PlainAttention(masks, self.marks), caches)
        return result.x, result.caches

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionCore,
        caches: Sequence[KVCache] | None,
        counted: torch.Tensor | None = None,
    ) -> LayerResult:
        x = self.model.embed_tokens(tokens)
        if self.facts.embedding_scale != 1:
            x = x * torch.tensor(self.facts.embedding_scale, dtype=x.dtype).item()
        x = self.marks(x, "embedded", "act_batch", "act_tokens", "act_embed")
        rotations = {
            rope: rotation(positions, frequencies, x.dtype)
            for rope, frequencies in zip(self.facts.ropes, self.rope_frequencies, strict=True)
        }
        context = LayerContext(rotations, attention, positions, self.experts_core, counted)
        result: LayerResult = self.model.layers(x, context, caches)
        return result._replace(x=self.model.norm(result.x))

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
        logits = soft_capped(logits, self.facts.logit_soft_cap)
        if self.padded_vocab == self.facts.vocab_size:
            return logits
        is_real = torch.arange(self.padded_vocab, device=logits.device) < self.facts.vocab_size
        return torch.where(is_real, logits, torch.finfo(logits.dtype).min)
