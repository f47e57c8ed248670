"""Every expert for every token, and then the chosen ones: the mathematics as it is written."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NAMES = ("x", "weights", "gate", "up", "down")


def plain_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    choices: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """x [B, T, D], weights and choices [B, T, K], gate, up [E, F, D], down [E, D, F] -> [B, T, D]."""
    hidden = F.silu(torch.einsum("btd,efd->btef", x, gate)) * torch.einsum("btd,efd->btef", x, up)
    results = torch.einsum("btef,edf->bted", hidden, down)
    chosen = results.gather(2, choices.long()[..., None].expand(*choices.shape, x.shape[-1]))
    return (chosen * weights[..., None]).sum(2)
