"""Several sources of records: what each of them is, and what a recipe may ask of their mixture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace

from tptrain.config.schema import DataSection, Recipe, SourceSection
from tptrain.config.settings import SOURCES, shown
from tptrain.errors import Problem

# Above this, a source would hardly ever be drawn: the weights are a mistake.
MOST_APART = 1e6

_OF_A_SOURCE = re.compile(rf"\bdata\.({'|'.join(field.name for field in fields(SourceSection))})\b")


def source_sections(data: DataSection) -> dict[str, DataSection]:
    """Name -> the section of a recipe that had this source alone, in the order of the names.

    Where there are no sources, the section itself, under "".
    """
    found = {"": data} if not data.sources else {}
    for name, source in sorted(data.sources.items()):
        given = {setting: value for setting, value in source.given().items() if setting != "weight"}
        found[name] = replace(data, sources={}, mix="concat", **given)
    return found


def problems_of_source(problems: Sequence[Problem], name: str) -> list[Problem]:
    """Problems of `source_sections(data)[name]` with their settings named as the recipe has them."""

    def renamed(text: str) -> str:
        return _OF_A_SOURCE.sub(rf"{SOURCES}.{name}.\1", text)

    def told(problem: Problem) -> Problem:
        setting, other, fix = renamed(problem.setting), renamed(problem.other), renamed(problem.fix)
        # A setting of the whole does not say which of the sources breaks its rule.
        other = other if setting.startswith(f"{SOURCES}.{name}.") else f"{other}; source {name}"
        return replace(problem, setting=setting, other=other, fix=fix)

    return [told(problem) for problem in problems] if name else list(problems)


def mixing_problems(recipe: Recipe) -> list[Problem]:
    """Names that are none, weights that are missing or too far apart, and a length that has no meaning."""
    data, problems = recipe.data, list[Problem]()
    for name in data.sources:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            passing = re.sub(r"[^\w-]+", "_", name).strip("_-") or "web"
            rule = "must be usable as a part of a setting"
            problems.append(Problem(f"{SOURCES}.{name}", name, rule, "letters, digits, _ and -", passing))
    if data.mix != "concat" and not data.sources:
        rule, fix = "needs sources to mix", f"concat, or {SOURCES}.NAME.path=FILE for each source"
        problems.append(Problem("data.mix", data.mix, rule, f"{SOURCES}=none", fix))
    elif data.mix != "concat" and recipe.schedule.epochs is not None:
        rule = "has no meaning where each source begins anew when it ends"
        fix = "none with schedule.max_steps=1000, or data.mix=concat"
        value = shown(recipe.schedule.epochs)
        problems.append(Problem("schedule.epochs", value, rule, f"data.mix={data.mix}", fix))
    return [*problems, *(_weight_problems(data) if data.mix == "weights" else [])]


def _weight_problems(data: DataSection) -> list[Problem]:
    weights = {name: source.weight for name, source in data.sources.items()}
    given = {name: weight for name, weight in weights.items() if weight is not None}
    missing = [name for name in weights if name not in given]
    rule = "is needed for every source with data.mix=weights"
    other = ", ".join(f"{name}: {shown(weight)}" for name, weight in weights.items())
    problems = [
        Problem(f"{SOURCES}.{name}.weight", "none", rule, other, "a number above 0, such as 1")
        for name in missing
    ]
    if given and max(given.values()) > MOST_APART * min(given.values()):
        name = min(given, key=lambda each: given[each])
        rule, fix = "must be at least a millionth of the largest weight", max(given.values()) / MOST_APART
        setting = f"{SOURCES}.{name}.weight"
        problems.append(Problem(setting, shown(given[name]), rule, other, f"{shown(fix)} or more"))
    return problems
