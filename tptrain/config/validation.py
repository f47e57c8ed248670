"""From pydantic's validation errors to problems in five parts."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from tptrain.config.schema import Recipe, SourceSection
from tptrain.config.settings import (
    SOURCES,
    Setting,
    sections,
    setting_of,
    shown,
    source_name,
    unknown_setting,
    value_of,
)
from tptrain.errors import Problem, nearest

_BOUND_RULES = {
    "greater_than_equal": ("ge", "must be at least", "smallest", "{} or more"),
    "greater_than": ("gt", "must be above", "must exceed", "a number above {}"),
    "less_than_equal": ("le", "must be at most", "largest", "{} or less"),
    "less_than": ("lt", "must be below", "must stay under", "a number below {}"),
}


def validation_problems(error: ValidationError, current: Recipe | None = None) -> list[Problem]:
    """One problem per setting that pydantic refused.

    current: a valid recipe whose values are offered as values that pass; None: the schema's defaults.
    """
    places = {kind.__name__: [name] for name, kind in sections().items()}
    # Built by itself, a source does not know its name yet.
    place = {**places, SourceSection.__name__: [*SOURCES.split("."), "NAME"]}.get(error.title, [])
    found: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        loc = [str(part) for part in item["loc"]]
        path = ".".join(_known_part([*place, *loc]))
        found.setdefault(path, _problem(path, dict(item), current))
    return list(found.values())


def _known_part(loc: list[str]) -> list[str]:
    """The location without what pydantic adds for the members of a union."""
    if loc[:2] == SOURCES.split("."):
        return loc[:4]
    return loc[:2] if loc[:1] and loc[0] in sections() else loc[:1]


def _problem(path: str, item: dict[str, Any], current: Recipe | None) -> Problem:
    setting = setting_of(path)
    value, kind = item["input"], item["type"]
    if kind == "unexpected_positional_argument":
        return Problem(path, value, "is given without a name", "settings are keywords", "section(name=value)")
    if setting is None and (path in sections() or source_name(path) is not None):
        name = sections().get(path, SourceSection).__name__
        return Problem(path, value, f"must be a {name}", f"type: {name}", f"{path}={name}(...)")
    if setting is None:
        return unknown_setting(path, value)
    if kind == "missing":
        return Problem(path, "none", "is required", f"type: {setting.kind}", f"{path}=...")
    fix = _passing(setting, current)
    if kind in _BOUND_RULES:
        return _bound_problem(setting, value, kind, item["ctx"], fix)
    if setting.choices:
        fix = nearest(str(value), setting.choices) or fix
        listed = ", ".join(setting.choices)
        return Problem(path, value, "must be one of its choices", f"choices: {listed}", fix)
    if kind == "finite_number":
        return Problem(path, value, "must be a finite number", f"type: {setting.kind}", fix)
    return _type_problem(setting, value, fix)


def _bound_problem(setting: Setting, value: object, kind: str, ctx: dict[str, Any], fix: str) -> Problem:
    key, rule, other, passing = _BOUND_RULES[kind]
    limit = shown(ctx[key])
    if key in ("ge", "le") or fix in ("", "none"):
        fix = passing.format(limit)
    return Problem(setting.path, value, f"{rule} {limit}", f"{other}: {limit}", fix)


def _type_problem(setting: Setting, value: object, fix: str) -> Problem:
    whole = _as_whole_number(value) if int in setting.types else None
    return Problem(
        setting.path,
        value,
        f"must be {_with_article(setting.type_words)}",
        f"type: {setting.kind}",
        whole or fix or _with_article(setting.kind),
    )


def _as_whole_number(value: object) -> str | None:
    """The whole number that a text such as "1e3" means, when it is one."""
    try:
        number = float(str(value))
        return str(int(number)) if number == int(number) else None
    except (ValueError, OverflowError):
        return None


def _with_article(words: str) -> str:
    return f"a {words}" if words.startswith(("whole", "number")) else words


def _passing(setting: Setting, current: Recipe | None) -> str:
    """A value known to pass; "" when there is none to name."""
    if setting.path == SOURCES:
        return '{"NAME": SourceSection(path=...)}'
    value = value_of(current, setting) if current else setting.default
    if value is None:
        return "none" if setting.optional and current else ""
    return "model.config=pretrained" if isinstance(value, dict) else shown(value)
