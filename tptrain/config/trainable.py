"""Which weights are trained: patterns of the recipe against the parameter table, or adapters beside it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from tptrain.config.schema import LoraSection, Recipe
from tptrain.errors import Problem, nearest
from tptrain.family import LayerRuns, ModelFacts, ParamRow, parameter_table, stored_rows, with_adapters
from tptrain.family.lora import adaptable_rows, is_target, module_of

FROZEN_DTYPE = "bfloat16"

_SETTING = "model.trainable"
_TARGETS = "lora.targets"
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
# Layers in the periods of loops above which a notice says what they cost.
MOST_TRACED = 8


def table_of(facts: ModelFacts, lora: LoraSection) -> tuple[ParamRow, ...]:
    """The parameter table of a model with the adapters that a recipe gives it."""
    table = parameter_table(facts)
    return with_adapters(table, lora.rank, lora.targets) if lora.rank else table


def is_trained(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns (as in a shell: `*` also matches dots) is or matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def with_frozen(table: Sequence[ParamRow], recipe: Recipe) -> tuple[ParamRow, ...]:
    """The table with what the recipe does not train frozen and held in bfloat16.

    Beside adapters that is all else, which is not saved then, since it can be read again. Without them it is
    what no pattern matches; a tied row goes with its own.
    """
    has_adapters = recipe.lora.rank > 0

    def frozen(row: ParamRow) -> ParamRow:
        if row.is_adapter or (
            not has_adapters and is_trained(row.tied_to or row.name, recipe.model.trainable)
        ):
            return row
        return dataclasses.replace(row, trainable=False, storage_dtype=FROZEN_DTYPE, saved=not has_adapters)

    return tuple(frozen(row) for row in table)


def trainable_problems(recipe: Recipe, table: Sequence[ParamRow]) -> list[Problem]:
    """Patterns that match nothing."""
    patterns = recipe.model.trainable
    if not patterns:
        return [Problem(_SETTING, "", "must name what is trained", "no pattern is given", "*")]
    names = [row.name for row in stored_rows(table)]
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    return [_unmatched(pattern, table, names) for pattern in unmatched]


def _unmatched(pattern: str, table: Sequence[ParamRow], names: Sequence[str]) -> Problem:
    tied = next((row for row in table if row.tied_to and fnmatchcase(row.name, pattern)), None)
    if tied is not None:
        rule, other = "must match a weight of its own", f"{tied.name} is tied to {tied.tied_to}"
        return Problem(_SETTING, pattern, rule, other, str(tied.tied_to))
    known = sorted({_LAYER.sub(r"\1*\3", name) for name in names})
    guess = nearest(pattern, known)
    fix = f"{guess} (did you mean it?)" if guess else "* or a pattern that matches one of them"
    return Problem(_SETTING, pattern, "matches no weight of the model", f"weights: {', '.join(known)}", fix)


def lora_problems(recipe: Recipe, table: Sequence[ParamRow]) -> list[Problem]:
    """What keeps a model from getting the adapters that the recipe asks for. table: of the model alone."""
    lora, patterns = recipe.lora, recipe.model.trainable
    if not lora.rank:
        return []
    problems = []
    if patterns != ("*",):
        rule, other = "must stay * beside adapters, which alone are trained", f"lora.rank={lora.rank}"
        problems.append(Problem(_SETTING, ",".join(patterns), rule, other, "*, or lora.rank=0"))
    if not lora.targets:
        rule, fix = "must name what gets an adapter", "heads,kv_heads,mlp"
        problems.append(Problem(_TARGETS, "", rule, "no target is given", fix))
    rows = adaptable_rows(table)
    for target in lora.targets:
        if not any(is_target(row, target) for row in rows):
            problems.append(_no_target(target, rows, table))
    adapted = [row for row in rows if any(is_target(row, target) for target in lora.targets)]
    smallest = min(adapted, key=lambda row: min(row.size), default=None)
    if smallest is not None and lora.rank > min(smallest.size):
        rule = "must not exceed the smaller side of an adapted matrix"
        other = f"{smallest.name} is {smallest.size[0]} x {smallest.size[1]}"
        problems.append(Problem("lora.rank", lora.rank, rule, other, f"{min(smallest.size)} or less"))
    return problems


def frozen_row_problems(recipe: Recipe, facts: ModelFacts, new_rows: int) -> list[Problem]:
    """Rows that the vocabulary has grown by and nothing would train: the new tokens would stay one and the
    same."""
    if not new_rows:
        return []
    rule = "must leave the embedding to be trained where tokens are added that the checkpoint has no rows for"
    held = facts.vocab_size - new_rows
    other = f"{held} rows, {facts.vocab_size} ids with the added tokens"
    fix = "tokens that the checkpoint has rows for"
    if recipe.lora.rank:
        return [Problem("lora.rank", recipe.lora.rank, rule, other, f"0, or {fix}")]
    patterns = recipe.model.trainable
    rows = [row.name for row in stored_rows(parameter_table(facts)) if "vocab" in row.dims]
    if all(is_trained(name, patterns) for name in rows):
        return []
    fix = f"{','.join(dict.fromkeys((*patterns, *rows)))}, or {fix}"
    return [Problem(_SETTING, ",".join(patterns), rule, other, fix)]


def _no_target(target: str, rows: Sequence[ParamRow], table: Sequence[ParamRow]) -> Problem:
    """rows: those that may be targets."""
    modules = sorted({module_of(row).rpartition(".")[2] for row in rows})
    dims = sorted({dim for row in rows for dim in row.dims})
    guess = nearest(target, [*dims, *modules])
    fix = f"{guess} (did you mean it?)" if guess else ",".join(dim for dim in dims if dim != "embed")
    other = f"dims: {', '.join(dims)}; modules: {', '.join(modules)}"
    if any("experts" in row.dims for row in table):
        other += "; experts get no adapters"
    return Problem(_TARGETS, target, "means no projection that can have an adapter", other, fix)


def run_notices(recipe: Recipe, runs: LayerRuns) -> list[str]:
    """What it costs to train other weights in every few layers: the XLA backend has a loop for each run."""
    chosen = _TARGETS if recipe.lora.rank else _SETTING
    is_default = not recipe.lora.rank and recipe.model.trainable == ("*",)
    if recipe.backend != "xla" or is_default or runs.traced <= MOST_TRACED:
        return []
    return [
        f"{chosen} leaves few layers alike: the step has {len(runs.runs)} loops over layers, which"
        f" compute {runs.traced} in a turn of each. Tracing and compiling take longer with each layer in a"
        f" turn; at most {MOST_TRACED} are advised."
    ]
