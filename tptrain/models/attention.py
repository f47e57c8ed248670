"""Grouped-query attention with segments, windows and a static key-value cache.

Shapes: B batch, T query tokens, S key tokens, N heads, K kv heads, G = N / K, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from tptrain.family import AttentionKind
from tptrain.models.marks import Marks


class AttentionCore(Protocol):
    """Attention between the projections, on the rows of one batch; all layers share it."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kind: AttentionKind
    ) -> torch.Tensor:
        """query [B, T, N, H], key and value [B, S, K, H] -> attended values [B, T, N, H]."""
        ...


# (segment_ids [B, T], the windows of the model's layers) -> the core for those rows.
CoreFactory = Callable[[torch.Tensor, Iterable[int | None]], AttentionCore]


class PlainAttention:
    """The mathematics as it is written: scores, mask, softmax, values, with [T, S] of them in memory.

    masks: window -> bool [B, T, S], who may look at whom.
    """

    def __init__(self, masks: Mapping[int | None, torch.Tensor], marks: Marks):
        self.masks, self.marks = masks, marks

    @classmethod
    def of_segments(
        cls, segment_ids: torch.Tensor, windows: Iterable[int | None], marks: Marks
    ) -> PlainAttention:
        return cls({window: causal_mask(segment_ids, window) for window in windows}, marks)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kind: AttentionKind
    ) -> torch.Tensor:
        scores = attention_scores(query, key)
        scores = self.marks(
            scores, "scores", "act_batch", "act_kv_heads", "act_group", "act_tokens", "act_keys"
        )
        weights = attention_weights(scores, self.masks[kind.window], kind.scale, kind.soft_cap)
        output = weighted_values(weights, value)
        return self.marks(output, "attended", "act_batch", "act_tokens", "act_heads", "act_head_dim")


@dataclass
class KVCache:
    """Keys and values of one layer for every position of a row: two of [B, S, K, H]."""

    key: torch.Tensor
    value: torch.Tensor


def causal_mask(segment_ids: torch.Tensor, window: int | None) -> torch.Tensor:
    """Who may look at whom in a row: segment_ids [B, T] -> bool [B, T, S=T].

    A token sees itself and earlier tokens of its own segment, at most `window` of them. Padding is a
    segment like any other (0), so every row of the mask allows something and no softmax is empty.
    """
    length = segment_ids.shape[1]
    steps = torch.arange(length, device=segment_ids.device)
    back = steps[:, None] - steps[None, :]
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    return near[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def cache_mask(positions: torch.Tensor, cache_length: int, window: int | None) -> torch.Tensor:
    """The same against a cache: queries at positions [B, T] -> bool [B, T, S], slot s holding position s."""
    slots = torch.arange(cache_length, device=positions.device)
    back = positions[:, :, None] - slots[None, None, :]
    return back >= 0 if window is None else (back >= 0) & (back < window)


def write_cache(cache: torch.Tensor, new: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Put new [B, T, K, H] into cache [B, S, K, H] at positions [B, T]; shapes stay as they are.

    T = S writes the whole row (a padded prompt starts at position 0 and fills its slots in order); T = 1
    selects by comparison, which stays local to each device where a scatter would not.
    """
    if new.shape[1] == 1:
        slots = torch.arange(cache.shape[1], device=cache.device)
        here = (slots[None, :] == positions)[:, :, None, None]
        return torch.where(here, new.to(cache.dtype), cache)
    return torch.cat([new.to(cache.dtype), cache[:, new.shape[1] :]], dim=1)


def attention_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Products of queries and keys: query [B, T, N, H], key [B, S, K, H] -> [B, K, G, T, S].

    Heads share keys by grouping, so keys are never repeated in memory.
    """
    grouped = query.unflatten(2, (key.shape[2], -1))
    return torch.einsum("btkgh,bskh->bkgts", grouped, key)


def attention_weights(
    scores: torch.Tensor, mask: torch.Tensor, scale: float, soft_cap: float | None = None
) -> torch.Tensor:
    """Softmax over keys: scores [B, K, G, T, S], mask bool [B, T, S] -> the same shape and format.

    Normalised in float32 or wider.
    """
    wide = (scores * scale).to(torch.promote_types(scores.dtype, torch.float32))
    blocked = torch.finfo(wide.dtype).min
    return torch.where(mask[:, None, None], soft_capped(wide, soft_cap), blocked).softmax(-1).to(scores.dtype)


def soft_capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(x / cap), computed in float32 or wider, in the format of x; x itself for None."""
    if cap is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (cap * torch.tanh(wide / cap)).to(x.dtype)


def weighted_values(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weights [B, K, G, T, S], value [B, S, K, H] -> [B, T, N, H]."""
    return torch.einsum("bkgts,bskh->btkgh", weights, value).flatten(2, 3)
