"""`tptrain search`: which mesh, remat policy and micro-batches make a run fastest on a slice.

tptrain search RECIPE topology=v5p-32 [setting=value ...]
    --compile N       how many layouts are compiled, the best by arithmetic first (default: 4; 0: none)
    --batch N,M       also N and M times the recipe's rows of a step
    --price USD       of a chip-hour: adds the cost of a billion tokens
    --libtpu PATH  --cache DIR  --json      as for tptrain dryrun

A setting that the command line gives is kept as it is. Everything is planned and estimated by arithmetic
first; only the best are traced and compiled. Ctrl-C ends the search with what it knows; the same command
goes on where it was, because compiled results are kept.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tptrain.config.options import split_options, whole_number
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import find_topology
from tptrain.config.schema import Recipe
from tptrain.dryrun.command import compile_request, trace_problems
from tptrain.dryrun.compiling import compile_program
from tptrain.dryrun.libtpu import installed_libtpu, libtpu_at
from tptrain.dryrun.tracing import TraceError, trace_in_child
from tptrain.errors import ProblemsError, refuse
from tptrain.estimate import memory_problems
from tptrain.estimate.candidates import SEARCHED, Candidate, Survey, layouts
from tptrain.report.search_page import SearchPage, SearchRow, ordered, search_json, search_lines
from tptrain.topology import Topology

# As shells count a process that SIGINT ended: 128 + 2.
INTERRUPTED = 130
_EXAMPLE = {
    "--compile": "4",
    "--batch": "2,4",
    "--price": "4.20",
    "--libtpu": "path/to/libtpu.so",
    "--cache": "path/to/folder",
}


@dataclass(frozen=True)
class SearchOptions:
    """Options of the command. price: USD of a chip-hour; libtpu, cache: paths, None for the defaults."""

    compiles: int = 4
    row_multiples: tuple[int, ...] = (1,)
    price: float | None = None
    libtpu: Path | None = None
    cache: Path | None = None
    as_json: bool = False


@dataclass
class _Progress:
    """What is known so far, for an interruption at any time."""

    survey: Survey = field(default_factory=Survey)
    compiled: list[SearchRow] = field(default_factory=list)


def read_options(args: Sequence[str]) -> tuple[SearchOptions, list[str]]:
    """The options among the arguments, and all other arguments. Raises ProblemsError."""
    found = split_options(args, _EXAMPLE, ("--json",))
    given = found.values
    options = SearchOptions(
        compiles=found.whole("--compile", 4, 0),
        row_multiples=_multiples(given.get("--batch", "1")),
        price=_price(given["--price"]) if "--price" in given else None,
        libtpu=found.path("--libtpu"),
        cache=found.path("--cache"),
        as_json="--json" in found.flags,
    )
    return options, found.rest


def _multiples(text: str) -> tuple[int, ...]:
    """1 and every number that is named."""
    return tuple(
        sorted(
            {1, *(whole_number("--batch", part.strip(), 1, _EXAMPLE["--batch"]) for part in text.split(","))}
        )
    )


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if math.isfinite(price) and price > 0:
        return price
    raise refuse("--price", text, "must be a number above 0", "USD of a chip-hour", _EXAMPLE["--price"])


def search(recipe: Recipe, given: Sequence[str], options: SearchOptions) -> int:
    """Search, print the page (or the JSON object), and return the exit code: 0, or 130 after Ctrl-C.

    given: overrides of the command line. Raises ProblemsError when every layout is refused or none can run.
    """
    asked = apply_overrides(recipe, given)
    topology = find_topology(asked, os.environ)
    compiles = options.compiles if topology.chip.platform == "tpu" else 0
    if compiles:
        _check_compiler(options.libtpu)
    held = [arg.partition("=")[0] for arg in given]
    progress, finished = _Progress(), True
    try:
        for layout in layouts(asked, topology, held, options.row_multiples):
            progress.survey.look_at(asked, layout)
        _compile_best(progress, compiles, options)
    except KeyboardInterrupt:
        finished = False
    page = search_page(progress.survey, progress.compiled, given, options.price, finished)
    if finished and not progress.survey.candidates:
        raise ProblemsError([refusal.problem for refusal in page.refusals])
    print(json.dumps(search_json(page), indent=1) if options.as_json else "\n".join(search_lines(page)))
    if not finished:
        return INTERRUPTED
    if page.best is None:
        raise _none_fits(topology, page, progress.survey)
    return 0


def search_page(
    survey: Survey, compiled: Sequence[SearchRow], given: Sequence[str], price: float | None, finished: bool
) -> SearchPage:
    """All candidates that fit by the estimate, those that were compiled with what the compiler said."""
    done = {id(row.candidate) for row in compiled}
    others = [SearchRow(one) for one in survey.ranked() if id(one) not in done]
    return SearchPage(
        rows=ordered([*compiled, *others]),
        too_large=len(survey.candidates) - len(compiled) - len(others),
        refusals=tuple(survey.refusals()),
        given=tuple(arg for arg in given if arg.partition("=")[0] not in SEARCHED),
        price=price,
        finished=finished,
    )


def _check_compiler(libtpu: Path | None) -> None:
    if libtpu is not None:
        libtpu_at(libtpu)
    elif installed_libtpu() is None:
        rule = "needs a TPU compiler, and none is installed"
        fix = "--compile 0, --libtpu PATH, or pip install 'tptrain[aot]'"
        raise refuse("--compile", "N", rule, "libtpu is missing", fix)


def _compile_best(progress: _Progress, compiles: int, options: SearchOptions) -> None:
    """Trace and compile the best by arithmetic, one after the other."""
    chosen = progress.survey.ranked()[:compiles]
    for number, candidate in enumerate(chosen, start=1):
        what = " ".join(f"{path}={candidate.changes[path]}" for path in SEARCHED)
        # Beside the result, which alone goes to stdout.
        print(f"Tracing and compiling {number} of {len(chosen)}: {what}", file=sys.stderr, flush=True)
        progress.compiled.append(compiled_row(candidate, options))


def compiled_row(candidate: Candidate, options: SearchOptions) -> SearchRow:
    """The candidate with its compile; a step that cannot be traced is told in the row."""
    try:
        traced = trace_in_child(candidate.plan)
    except TraceError as error:
        return SearchRow(candidate, failure=str(error))
    if problems := trace_problems(traced):
        return SearchRow(candidate, failure=str(problems[0]))
    request = compile_request(candidate.plan, traced, options.libtpu)
    return SearchRow(candidate, compile_program(request, options.cache))


def _none_fits(topology: Topology, page: SearchPage, survey: Survey) -> ProblemsError:
    """The refusal of a slice, with what would make its smallest layout fit."""
    smallest = min(survey.candidates, key=lambda one: one.found.memory.total_bytes)
    problems = memory_problems(smallest.plan, smallest.found)
    fix = "a larger slice, or what the rows say"
    if problems:
        layout = " ".join(f"{path}={value}" for path, value in smallest.changes.items())
        fix = f"{problems[0].fix} (with {layout})"
    too_large = f"{page.too_large} are larger than a chip's or a host's memory by the estimate"
    tried = f"{len(page.rows)} failed, {too_large}"
    return refuse("topology", topology.name, "must have a layout that can run", tried, fix)
