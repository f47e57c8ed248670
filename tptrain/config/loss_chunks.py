"""How many tokens of a row have their logits computed at a time."""

from __future__ import annotations

import math

from tptrain.config.schema import Recipe
from tptrain.errors import Problem

# What the logits of a chunk take on one device, in float32, where the recipe leaves it to the plan. With more
# than one chunk the head's gradient is added up in float32, so smaller chunks save little.
LOGITS_BYTES = 2**31


def chunk_problems(recipe: Recipe) -> list[Problem]:
    """Chunks must divide the row."""
    asked, seq_len = recipe.loss.chunk_tokens, recipe.data.seq_len
    if not asked or seq_len % asked == 0:
        return []
    below = max(d for d in _divisors(seq_len) if d < asked)
    above = [d for d in _divisors(seq_len) if d > asked]
    fix = " or ".join(str(tokens) for tokens in (below, *above[:1]))
    other = f"data.seq_len={seq_len}"
    return [Problem("loss.chunk_tokens", asked, "must divide the tokens of a row", other, fix)]


def chunk_tokens(seq_len: int, token_bytes: int) -> int:
    """Tokens of a row per chunk: the divisor of the row whose logits come nearest to LOGITS_BYTES.

    token_bytes: what one token of every row of a device takes.
    """
    wanted = LOGITS_BYTES / token_bytes
    return min(_divisors(seq_len), key=lambda tokens: abs(math.log(tokens / wanted)))


def chunk_notices(recipe: Recipe, chosen: int, token_bytes: int) -> list[str]:
    """A sentence where no divisor of the row comes near to LOGITS_BYTES, and the plan chose the chunk."""
    held, seq_len = chosen * token_bytes, recipe.data.seq_len
    if recipe.loss.chunk_tokens or held <= 2 * LOGITS_BYTES or chosen == 1:
        return []
    gib, wanted = held / 2**30, LOGITS_BYTES / 2**30
    below = max(tokens for tokens in _divisors(seq_len) if tokens < chosen)
    return [
        f"The logits of {chosen} tokens of a row take {gib:.1f} GiB on each device: no divisor of"
        f" data.seq_len={seq_len} comes nearer to {wanted:.0f} GiB, the next one is {below}. A length with"
        " more divisors, or loss.chunk_tokens, would change that."
    ]


def _divisors(number: int) -> list[int]:
    """In rising order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
