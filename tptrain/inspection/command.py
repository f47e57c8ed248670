"""`tptrain data inspect RECIPE`: see the rows before anything is trained on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from tptrain.config.options import split_options
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.schema import Recipe
from tptrain.data.render import texts_of
from tptrain.data.sources import open_records
from tptrain.data.split import split_records
from tptrain.data.tokenizer import load_tokenizer, make_tokenizer
from tptrain.errors import Problem, refuse
from tptrain.inspection.findings import Findings, inspect_records
from tptrain.inspection.pages import html_page, print_findings

USAGE = """\
usage: tptrain data inspect RECIPE [setting=value ...] [--rows N] [--html FILE] [--json]

--rows N     how many rows are shown token by token (default: 4)
--html FILE  write the page as well: one file with everything in it
--json       numbers and tokens as one JSON object, in the place of the text

The exit code is 2 where a run would refuse the records.
"""
_ROWS = 4
_EXAMPLE = {"--rows": "8", "--html": "rows.html"}


@dataclass(frozen=True)
class InspectOptions:
    """rows: how many are shown. page: where the HTML page goes; None for none."""

    rows: int
    page: Path | None
    as_json: bool


def read_options(args: Sequence[str]) -> tuple[InspectOptions, list[str]]:
    """The options among the arguments, and all other arguments. Raises ProblemsError."""
    found = split_options(args, _EXAMPLE, ("--json",))
    rows = found.whole("--rows", _ROWS, 0)
    return InspectOptions(rows, found.path("--html"), "--json" in found.flags), found.rest


def inspect(recipe: Recipe, overrides: Sequence[str], options: InspectOptions) -> Sequence[Problem]:
    """Print what a run would see of a recipe's records; the problems for which it would refuse them."""
    recipe = apply_overrides(recipe, overrides)
    found = _inspected(recipe, options.rows)
    if options.as_json:
        print(json.dumps(asdict(found), ensure_ascii=False, default=str))
    else:
        print_findings(found, recipe.data, Console())
    if options.page is not None:
        _write(options.page, html_page(found, recipe.data, f"Data of {recipe.name}"))
    return found.problems


def _inspected(recipe: Recipe, rows: int) -> Findings:
    data = recipe.data
    records = open_records(data.path, data.subset, data.split, data.max_records)
    if data.validation:
        records, _ = split_records(records, data)
    if recipe.model.tokenizer == "train":
        vocab_size = plan_recipe(recipe).facts.vocab_size
        tokenizer = make_tokenizer(recipe.model, texts_of(records, data), vocab_size)
    else:
        tokenizer = load_tokenizer(recipe.model)
    return inspect_records(records, tokenizer, data, rows)


def _write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        other = error.strerror or str(error)
        raise refuse("--html", path, "must be a file that can be written", other, "another path") from error
