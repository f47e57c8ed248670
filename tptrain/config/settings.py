"""Every setting of a recipe by its dotted name: type, bounds, default and meaning, read from the schema."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from tptrain.config.schema import Recipe, SourceSection
from tptrain.errors import Problem

_TYPE_WORDS = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    dict: "fields",
    tuple: "texts separated by commas",
}
SOURCES = "data.sources"
_BOUND_WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Setting:
    """One setting. `path` is its dotted name, `section` the part before the dot, "" for the recipe's own."""

    path: str
    section: str
    types: tuple[Any, ...]
    optional: bool
    choices: tuple[str, ...]
    bounds: tuple[tuple[str, float], ...]
    required: bool
    default: object
    meaning: str

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def type_words(self) -> str:
        """The type in words, without bounds: "whole number", "text or none", "one of none, full"."""
        if self.choices:
            words = [f"one of {', '.join(self.choices)}"]
        else:
            words = [_TYPE_WORDS[kind] for kind in self.types]
        return " or ".join([*words, "none"] if self.optional else words)

    @property
    def kind(self) -> str:
        """The type in words with its bounds: "whole number, at least 1"."""
        limits = [f"{_BOUND_WORDS[kind]} {shown(limit)}" for kind, limit in self.bounds]
        return ", ".join([self.type_words, *limits])


def shown(value: object) -> str:
    """A value as it is written in an override: none, true, 2e-05, text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if value == {}:
        return "none"
    if isinstance(value, tuple | list):
        return ",".join(str(part) for part in value)
    return str(value)


@cache
def sections() -> dict[str, type]:
    """Name -> class of each section, in the order of the schema."""
    fields = _fields(Recipe).items()
    return {name: info.annotation for name, info in fields if dataclasses.is_dataclass(info.annotation)}


@cache
def settings() -> dict[str, Setting]:
    """Dotted name -> setting: those of the recipe itself first, then section by section."""
    found = {n: _setting(n, "", info) for n, info in _fields(Recipe).items() if n not in sections()}
    for section, kind in sections().items():
        for name, info in _fields(kind).items():
            found[f"{section}.{name}"] = _setting(f"{section}.{name}", section, info)
    return found


@cache
def source_settings(name: str) -> dict[str, Setting]:
    """Dotted name -> setting of one of several sources."""
    section = f"{SOURCES}.{name}"
    fields = _fields(SourceSection).items()
    return {f"{section}.{leaf}": _setting(f"{section}.{leaf}", section, info) for leaf, info in fields}


def setting_of(key: str) -> Setting | None:
    """The setting of a dotted name, among them those of sources; None where it is none."""
    name = source_name(key.rpartition(".")[0])
    return settings().get(key) if name is None else source_settings(name).get(key)


def source_name(section: str) -> str | None:
    """NAME of a section data.sources.NAME; None for any other."""
    outer, _, name = section.rpartition(".")
    return name if outer == SOURCES else None


def value_of(recipe: Recipe, setting: Setting) -> Any:
    """The value that a recipe gives to a setting."""
    name = source_name(setting.section)
    if name is not None:
        return getattr(recipe.data.sources.get(name, SourceSection()), setting.leaf)
    holder = getattr(recipe, setting.section) if setting.section else recipe
    return getattr(holder, setting.leaf)


def unknown_setting(key: str, value: object) -> Problem:
    """The problem of a name that is no setting: did-you-mean, and the list of the section it points into."""
    section, _, _ = key.rpartition(".")
    if source_name(key) is not None:
        rule, fix = "is a source, not a setting", f"{key}.path=... or another setting of a source"
        return Problem(key, value, rule, _listing(key), fix)
    name, whole = source_name(section), f"data.{key.rpartition('.')[2]}"
    if name is not None and whole in settings():
        return Problem(
            key, value, "is not a setting of a source", _listing(section), f"{whole}, for all sources"
        )
    guess = _most_like(key, settings() if name is None else source_settings(name))
    fix = f"{guess} (did you mean it?)" if guess else "a setting that --help lists"
    if key in sections():
        fix = f"{key}.{next(iter(_leaves(key)))}=... or another setting of that section"
        return Problem(key, value, "is a section, not a setting", _listing(key), fix)
    return Problem(key, value, "is not a known setting", _listing(section), fix)


def _listing(section: str) -> str:
    if source_name(section) is not None:
        return f"settings of a source: {', '.join(_fields(SourceSection))}"
    if section in sections():
        return f"settings of {section}: {', '.join(_leaves(section))}"
    return f"sections: {', '.join(sections())}; and {', '.join(_leaves(''))}"


def _leaves(section: str) -> list[str]:
    return [setting.leaf for setting in settings().values() if setting.section == section]


def _most_like(key: str, among: Mapping[str, Setting]) -> str | None:
    """The setting most like `key`, by its last part first; initials count as well (lr: learning_rate)."""
    section, _, leaf = key.lstrip("-").rpartition(".")

    def score(setting: Setting) -> float:
        initials = "".join(word[:1] for word in setting.leaf.split("_"))
        same = leaf == setting.leaf or (leaf == initials and len(leaf) > 1)
        leaf_score = 1.0 if same else _ratio(leaf, setting.leaf)
        return 0.7 * leaf_score + 0.3 * _ratio(section, setting.section)

    best = max(among.values(), key=score)
    return best.path if score(best) >= 0.55 else None


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def _fields(kind: Any) -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = kind.__pydantic_fields__
    return found


def _setting(path: str, section: str, info: FieldInfo) -> Setting:
    members = _members(info.annotation)
    kinds = [kind for kind in members if kind is not type(None)]
    choices = tuple(str(c) for kind in kinds if get_origin(kind) is Literal for c in get_args(kind))
    return Setting(
        path=path,
        section=section,
        types=tuple(get_origin(kind) or kind for kind in kinds),
        optional=len(kinds) < len(members),
        choices=choices,
        bounds=tuple(_bounds(info.metadata)),
        required=info.is_required(),
        default=None if info.is_required() else info.get_default(call_default_factory=True),
        meaning=" ".join((info.description or "").split()),
    )


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _bounds(metadata: Iterable[Any]) -> Iterable[tuple[str, float]]:
    for item in metadata:
        for kind in _BOUND_WORDS:
            if hasattr(item, kind):
                yield kind, getattr(item, kind)
