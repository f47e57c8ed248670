"""The text of `--help`: every setting with its type, this recipe's value and its one line of meaning."""

from __future__ import annotations

import json
import textwrap

from tptrain.config.schema import Recipe, SourceSection
from tptrain.config.settings import SOURCES, Setting, sections, settings, shown, source_settings, value_of

_WIDTH = 100
_LEFT = 44


def render_help(recipe: Recipe, program: str) -> str:
    """Plain text of at most 100 columns. program: what to type before the settings."""
    blocks = [
        f"usage: {program} [setting=value ...]",
        _wrapped(
            f"Settings of the recipe {recipe.name!r}, as setting=value with this recipe's value. A value of"
            " none empties a setting that may be empty; -1 and auto are filled in by the plan."
            " --resume auto|never|STEP is resume=..., --unverified is unverified=true.",
            "",
        ),
        "\n".join(["recipe: The run as a whole.", *_section_lines(recipe, "")]),
    ]
    for section, kind in sections().items():
        heading = _wrapped(f"{section}: {_first_line(kind.__doc__)}", "")
        blocks.append("\n".join([heading, *_section_lines(recipe, section)]))
        if section == SOURCES.partition(".")[0]:
            blocks.append(_source_block())
    return "\n\n".join(blocks) + "\n"


def _source_block() -> str:
    heading = _wrapped(f"{SOURCES}.NAME: {_first_line(SourceSection.__doc__)}", "")
    lines = [_setting_lines(setting, setting.default) for setting in source_settings("NAME").values()]
    return "\n".join([heading, *(line for each in lines for line in each)])


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]


def _section_lines(recipe: Recipe, section: str) -> list[str]:
    lines = []
    for setting in settings().values():
        if setting.section == section:
            lines += _setting_lines(setting, value_of(recipe, setting))
    return lines


def _setting_lines(setting: Setting, value: object) -> list[str]:
    if isinstance(value, dict) and value:
        left, fields = f"  {setting.path}=the fields below", _field_lines(value)
    else:
        left, fields = f"  {setting.path}={shown(value)}", []
    kind = f"[{setting.kind}]"
    if len(left) < _LEFT and _LEFT + len(kind) <= _WIDTH:
        lines = [left.ljust(_LEFT) + kind]
    else:
        lines = [left, _wrapped(kind, " " * 6)]
    return [*lines, _wrapped(setting.meaning, " " * 6), *fields]


def _field_lines(config: dict[str, object]) -> list[str]:
    given = ", ".join(
        f"{name}={json.dumps(value, default=SourceSection.given)}" for name, value in config.items()
    )
    return [_wrapped(given, " " * 8)]


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
