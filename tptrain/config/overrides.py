"""`section.setting=value` arguments, applied to a recipe."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tptrain.config.schema import Recipe
from tptrain.config.settings import (
    SOURCES,
    Setting,
    sections,
    setting_of,
    settings,
    source_name,
    unknown_setting,
    value_of,
)
from tptrain.config.validation import validation_problems
from tptrain.errors import Problem, raise_if_any, refuse

_NONE_WORDS = ("none", "null")
_MODEL_FIELD = "model.config."

# Options in the common form, for the settings of a restart loop.
_VALUE_OPTION, _FLAG_OPTION = "--resume", "--unverified"

# Section -> name -> value; the recipe's own settings are under "".
_Values = dict[str, dict[str, Any]]


def apply_overrides(recipe: Recipe, args: Sequence[str]) -> Recipe:
    """A new recipe with every `key=value` of `args` applied, values typed by the schema.

    "none" and "null" empty an optional setting. `model.config.FIELD=value` sets one field of the architecture
    (JSON, else text). Raises ProblemsError with everything that is wrong with the arguments.

    >>> apply_overrides(Recipe(name="a"), ["mesh.tensor=2"]).mesh.tensor
    2
    """
    problems: list[Problem] = []
    values = _values(recipe)
    given: dict[str, str] = {}
    for arg in args:
        key, equals, text = arg.partition("=")
        if not equals:
            problems.append(_not_key_value(arg))
        elif key in given:
            other = f"given before as {key}={given[key]}"
            problems.append(Problem(key, text, "is given twice", other, f"{key}={text} once"))
        else:
            given[key] = text
            problems += _assign(values, key, text)
    changed, more = _validated(recipe, values)
    raise_if_any([*problems, *more])
    return changed


def spelled_out(args: Sequence[str]) -> list[str]:
    """The arguments with `--resume auto`, `--resume=auto` and `--unverified` as settings.

    Raises ProblemsError for a `--resume` with nothing behind it.

    >>> spelled_out(["--resume", "auto", "--unverified", "mesh.tensor=2"])
    ['resume=auto', 'unverified=true', 'mesh.tensor=2']
    """
    found: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        if arg == _VALUE_OPTION:
            value = next(remaining, None)
            if value is None or value.startswith("-") or "=" in value:
                other = f"followed by {value}" if value else "it is the last argument"
                raise refuse(_VALUE_OPTION, "", "needs a value", other, f"{_VALUE_OPTION} auto")
            found.append(f"resume={value}")
        elif arg.startswith(f"{_VALUE_OPTION}="):
            found.append(arg.removeprefix("--"))
        else:
            found.append("unverified=true" if arg == _FLAG_OPTION else arg)
    return found


def _validated(recipe: Recipe, values: _Values) -> tuple[Recipe, list[Problem]]:
    try:
        nested = {**values[""], **{section: values[section] for section in sections()}}
        return TypeAdapter(Recipe).validate_python(nested), []
    except ValidationError as error:
        return recipe, validation_problems(error, recipe)


def _values(recipe: Recipe) -> _Values:
    """The recipe's values as plain dicts that share nothing with it."""
    found: _Values = {"": {}, **{section: {} for section in sections()}}
    for setting in settings().values():
        found[setting.section][setting.leaf] = copy.deepcopy(value_of(recipe, setting))
    found["data"]["sources"] = {name: source.given() for name, source in recipe.data.sources.items()}
    return found


def _not_key_value(arg: str) -> Problem:
    key = arg.lstrip("-")
    known = key if setting_of(key) else "section.setting"
    return Problem("argument", arg, "must have the form key=value", "it has no '='", f"{known}=value")


def _assign(values: _Values, key: str, text: str) -> list[Problem]:
    """Put one override into `values`; what pydantic will judge is left as text."""
    if key.startswith(_MODEL_FIELD):
        return _assign_model_field(values["model"], key, text)
    setting = setting_of(key)
    if setting is None:
        return [unknown_setting(key, text)]
    if key == SOURCES:
        return _assign_no_sources(values["data"], text)
    if text == "":
        fix = "none" if setting.optional else f"{key}=VALUE"
        return [Problem(key, "", "must not be empty", f"type: {setting.kind}", fix)]
    source = source_name(setting.section)
    holder = values[setting.section] if source is None else values["data"]["sources"].setdefault(source, {})
    holder[setting.leaf] = _read(setting, text)
    return []


def _assign_no_sources(data: dict[str, Any], text: str) -> list[Problem]:
    """What can be said of all sources at once is that there are none."""
    if text.lower() not in _NONE_WORDS:
        rule, fix = (
            "is given by the settings of each source",
            f"{SOURCES}.NAME.path={text or 'FILE'}, or none",
        )
        named = f"sources: {', '.join(data['sources']) or 'none'}"
        return [Problem(SOURCES, text, rule, named, fix)]
    data["sources"] = {}
    return []


def _read(setting: Setting, text: str) -> str | list[str] | None:
    if setting.optional and text.lower() in _NONE_WORDS:
        return None
    return [part.strip() for part in text.split(",")] if tuple in setting.types else text


def _assign_model_field(model: dict[str, Any], key: str, text: str) -> list[Problem]:
    """Set one field, or a field of a field (`model.config.rope_scaling.factor`), of the architecture."""
    config = model["config"]
    *outer, field = key.removeprefix(_MODEL_FIELD).split(".")
    if not isinstance(config, dict):
        rule, other = "needs an architecture given by its fields", f"model.config={config}"
        return [Problem(key, text, rule, other, "a config.json with this change, as model.config=PATH")]
    for depth, name in enumerate(outer):
        inside = config.get(name)
        if not isinstance(inside, dict):
            path = _MODEL_FIELD + ".".join(outer[: depth + 1])
            rule, fix = f"needs {path} to have fields", f"{path}={{...}} as JSON"
            return [Problem(key, text, rule, f"{path}={json.dumps(inside)}", fix)]
        config = inside
    config[field] = _json_or_text(text)
    return []


def _json_or_text(text: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
