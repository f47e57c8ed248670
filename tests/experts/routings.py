"""Choices of experts as routers make them, and as they never should."""

from __future__ import annotations

import torch


def routing(kind: str, tokens: tuple[int, ...], choices: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Different experts for every token, int32 [*tokens, choices].

    kind: "even": any; "empty": none but the last few; "one": the same for every token.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(*tokens, experts, generator=generator)
    if kind == "empty":
        scores[..., : experts - choices - 1] = -1
    if kind == "one":
        scores[:] = torch.rand(experts, generator=generator)
    return scores.topk(choices, dim=-1).indices.int()
