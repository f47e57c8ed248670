"""`tptrain data inspect RECIPE`: see the rows before anything is trained on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from tptrain.config.mixing import problems_of_source
from tptrain.config.options import split_options
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.schema import Recipe
from tptrain.data.recipe_sources import Source, open_sources, texts_of_sources
from tptrain.data.tokenizer import load_tokenizer, make_tokenizer
from tptrain.errors import Problem, refuse
from tptrain.inspection.findings import Findings, inspect_records
from tptrain.inspection.pages import html_page, print_findings

USAGE = """\
usage: tptrain data inspect RECIPE [setting=value ...] [--rows N] [--html FILE] [--json]

--rows N     how many rows are shown token by token (default: 4)
--html FILE  write the page as well: one file with everything in it; of several sources FILE-NAME for each
--json       numbers and tokens as one JSON object, in the place of the text; of several sources by name

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
    sources = open_sources(recipe.data)
    tokenizer = _tokenizer(recipe, sources)
    found = {}
    for source in sources:
        with source.naming():
            found[source.name] = inspect_records(source.records, tokenizer, source.section, options.rows)
    if options.as_json:
        by_name = {name: asdict(each) for name, each in found.items()}
        print(json.dumps(by_name.get("", by_name), ensure_ascii=False, default=str))
    for source in sources:
        _show(source, found[source.name], recipe, options)
    return [problem for name, each in found.items() for problem in problems_of_source(each.problems, name)]


def _tokenizer(recipe: Recipe, sources: Sequence[Source]) -> PreTrainedTokenizerFast:
    if recipe.model.tokenizer != "train":
        return load_tokenizer(recipe.model)
    return make_tokenizer(recipe.model, texts_of_sources(sources), plan_recipe(recipe).facts.vocab_size)


def _show(source: Source, found: Findings, recipe: Recipe, options: InspectOptions) -> None:
    """The findings of one source, under its name where there are several: as text, and as a page."""
    if not options.as_json:
        console = Console()
        if source.name:
            console.rule(source.name, characters="-", align="left", style="bold")
        print_findings(found, source.section, console)
    if options.page is not None:
        page, title = options.page, f"Data of {recipe.name}"
        if source.name:
            page, title = page.with_stem(f"{page.stem}-{source.name}"), f"{title}, {source.name}"
        _write(page, html_page(found, source.section, title))


def _write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        other = error.strerror or str(error)
        raise refuse("--html", path, "must be a file that can be written", other, "another path") from error
