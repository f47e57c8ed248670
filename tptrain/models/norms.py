"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import nn

from tptrain.family.facts import NormScale


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim (arXiv:1910.07467); the mean in float32 or wider.

    scale: how the weight acts, see `ModelFacts.norm_scale`.
    """

    def __init__(self, size: int, eps: float, scale: NormScale = "after_cast"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.scale = eps, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.scale == "after_cast":
            return self.weight * normed.to(x.dtype)
        weight = self.weight.to(wide.dtype)
        return (normed * (1 + weight if self.scale == "one_plus" else weight)).to(x.dtype)
