"""Problems a user can act on.

Every bad input becomes a `Problem` with the same five parts: the setting, the value it was given,
the rule it breaks, the other number (or name) involved, and a value that would pass. Checks collect
problems and raise them together, so one run of a command shows everything there is to fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    setting: dotted path of the setting (`mesh.tensor`), or the name of a file or command argument.
    value:   what the user gave, as it was given.
    rule:    the rule in words, read after the setting: "must divide the number of kv heads".
    other:   the other number or name the rule compares with: "num_key_value_heads=8".
    fix:     a value that would pass, or the action that mends it: "1, 2, 4 or 8".
    """

    setting: str
    value: object
    rule: str
    other: str
    fix: str

    def __str__(self) -> str:
        return f"{self.setting}={self.value}: {self.rule} ({self.other}); use {self.fix}"


class TptrainError(Exception):
    """Base of every error that tptrain raises on purpose."""


class ProblemsError(TptrainError):
    """One or more problems with what the user gave; nothing was started or written."""

    def __init__(self, problems: Sequence[Problem]):
        assert problems, "ProblemsError needs at least one problem"
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{head}:", *(f"  - {problem}" for problem in self.problems)]))


def refuse(setting: str, value: object, rule: str, other: str, fix: str) -> ProblemsError:
    """The error for a single problem: `raise refuse("data.path", path, "must exist", ...)`."""
    return ProblemsError([Problem(setting, value, rule, other, fix)])


def raise_if_any(problems: Sequence[Problem]) -> None:
    if problems:
        raise ProblemsError(problems)


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_name(setting: str, value: str, kind: str, choices: Iterable[str]) -> Problem:
    """The problem of a name outside a closed list, with did-you-mean and the list itself."""
    known = sorted(choices)
    guess = nearest(value, known)
    fix = f"{guess!r} (did you mean it?)" if guess else "a name from that list"
    return Problem(setting, value, f"is not a known {kind}", f"known: {', '.join(known)}", fix)
