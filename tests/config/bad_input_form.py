"""The form of one bad input: what triggers it, the five parts of its problem, and advice that works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BadInput:
    """One bad input. rule, other, fix: what these parts must contain.

    overrides: applied to the small recipe of samples.py, which plans well without them. `{tmp}` stands for
               the test's temporary folder, in which `files` are written first.
    script:    the text of a recipe script to be loaded and planned instead.
    mended:    overrides that follow the advice.
    problems:  how many problems there are in all, for inputs that break several rules at once.
    """

    name: str
    setting: str
    value: object
    rule: str
    other: str
    fix: str
    overrides: tuple[str, ...] = ()
    script: str | None = None
    mended: tuple[str, ...] | None = None
    problems: int = 1
    files: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
