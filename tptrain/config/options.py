"""Options of a command: those with a value, those without, and everything else."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tptrain.errors import refuse


@dataclass(frozen=True)
class Options:
    """values: option -> its text. flags: those given that take no value. rest: all other arguments."""

    values: Mapping[str, str]
    flags: frozenset[str]
    rest: list[str]

    def path(self, name: str) -> Path | None:
        """The path that an option names; None where it is not given."""
        return Path(self.values[name]).expanduser() if name in self.values else None

    def whole(self, name: str, default: int, least: int) -> int:
        """The whole number that an option gives, at least `least`. Raises ProblemsError for anything else."""
        text = self.values.get(name, str(default))
        return whole_number(name, text, least, str(max(default, least)))


def whole_number(name: str, text: str, least: int, example: str) -> int:
    """A whole number from an argument. Raises ProblemsError for anything else, or one below `least`."""
    if text.isdecimal() and int(text) >= least:
        return int(text)
    raise refuse(name, text, f"must be a whole number, at least {least}", "whole numbers", example)


def split_options(args: Sequence[str], examples: Mapping[str, str], flags: Collection[str]) -> Options:
    """Take the options out of the arguments: `--name value` or `--name=value`, and flags.

    examples: option with a value -> an example of one. Raises ProblemsError for an option without its value.
    """
    values: dict[str, str] = {}
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        name, equals, value = arg.partition("=")
        if name in examples:
            given = value if equals else next(remaining, "")
            if not given:
                raise refuse(name, "", "needs a value", "it is the last argument", f"{name} {examples[name]}")
            values[name] = given
        else:
            rest.append(arg)
    found = frozenset(flags) & frozenset(rest)
    return Options(values, found, [arg for arg in rest if arg not in found])
