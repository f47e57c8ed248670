"""Rotary position embedding (arXiv:2104.09864) and its scaling variants.

Shapes: B batch, T tokens, N heads, H head dim.
"""

from __future__ import annotations

import math

import torch

from tptrain.family import RopeFacts


def inverse_frequencies(rope: RopeFacts, head_dim: int) -> torch.Tensor:
    """Rotation per position of each pair of channels, in radians. Returns [H / 2] float32.

    Computed on the host in float32, in the order of operations that transformers uses: with positions in
    the thousands, the last bit of a frequency is visible in the logits.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3_scaled(frequencies, rope)
    return frequencies


def _llama3_scaled(frequencies: torch.Tensor, rope: RopeFacts) -> torch.Tensor:
    """Llama 3.1's scaling: long waves divided by `factor`, short ones kept, a blend in between."""
    old_context = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    blend = (old_context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * (frequencies / rope.factor) + blend * frequencies
    scaled = torch.where(
        wavelengths > old_context / rope.low_freq_factor, frequencies / rope.factor, frequencies
    )
    is_short = wavelengths < old_context / rope.high_freq_factor
    is_long = wavelengths > old_context / rope.low_freq_factor
    return torch.where(~is_short & ~is_long, blended, scaled)


def rotation(
    positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every angle: positions [B, T], frequencies [H / 2] -> two of [B, T, 1, H]."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[:, :, None] * frequencies.to(wide)
    both = torch.cat([angles, angles], dim=-1)[:, :, None, :]
    return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel i with channel i + H/2 (Hugging Face's layout): x [B, T, N, H]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
