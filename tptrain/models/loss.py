"""Token-weighted cross-entropy."""

from __future__ import annotations

import torch


def loss_sum(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of weight x negative log-likelihood, in float32 or wider.

    logits [B, T, V], targets [B, T] integers, weights [B, T]. The target's logit is selected by comparison
    instead of a gather: with V split over devices, each one contributes its part and nothing is collected.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    vocab = torch.arange(wide.shape[-1], device=wide.device)
    at_target = torch.where(vocab == targets[..., None], wide, 0.0).sum(-1)
    return ((wide.logsumexp(-1) - at_target) * weights).sum()
