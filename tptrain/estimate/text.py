"""Numbers as people read them."""

from __future__ import annotations

import math


def bytes_text(count: float) -> str:
    """512 B, 1.50 GiB."""
    if count < 1024:
        return f"{count:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(count, 1024)), len(units))
    return f"{count / 1024**power:.2f} {units[power - 1]}"


def seconds_text(seconds: float) -> str:
    """1.23 s, 45.6 ms, 7.8 µs."""
    if seconds >= 1 or not seconds:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
