"""What runs in a process that is killed: a conversion, and death at a chosen moment of it.

Imports what a conversion imports, because processes are forked from one that has done so.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from tools import convert_ckpt
from tptrain.convert import conversion
from tptrain.convert.progress import ByteProgress


def convert_and_die(words: list[str], part: float) -> None:
    """A conversion, killed when `part` of its bytes is handed on."""

    class Deadly(ByteProgress):
        def __call__(self, num_bytes: int) -> None:
            super().__call__(num_bytes)
            if self._done >= part * self._total:
                _die()

    conversion.ByteProgress = Deadly  # type: ignore[misc]
    convert_ckpt.main(words)


def convert_and_die_at_rename(words: list[str], target: str, after: bool) -> None:
    """A conversion, killed when something is to be renamed to a path that ends in `target`, or just was."""
    rename, replace = os.rename, os.replace

    def deadly(do: Any, source: Any, to: Any, *more: Any, **options: Any) -> None:
        hit = str(to).endswith(target)
        if hit and not after:
            _die()
        do(source, to, *more, **options)
        if hit:
            _die()

    os.rename = lambda *given, **options: deadly(rename, *given, **options)
    os.replace = lambda *given, **options: deadly(replace, *given, **options)
    convert_ckpt.main(words)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
