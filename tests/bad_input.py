"""The form of one bad input, for tables of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BadInput:
    """One row: `trigger(tmp_path)` raises a ProblemsError with one problem of this setting.

    value: the end of the value that is shown. rule, other, fix: what these parts contain.
    """

    name: str
    trigger: Callable[[Path], object]
    setting: str
    value: str
    rule: str
    other: str
    fix: str
