"""The ways to lay out one run on its slice, each planned and estimated by arithmetic.

A layout is a mesh shape, a remat policy, the rows of a step and the number of micro-batches that they are
worked on in. None of them but the rows changes what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from tptrain.config.overrides import apply_overrides
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.config.remat import OFFLOADED
from tptrain.config.schema import Recipe
from tptrain.config.settings import settings, shown, value_of
from tptrain.errors import Problem, ProblemsError
from tptrain.estimate.changes import Change
from tptrain.estimate.estimate import Estimate, estimate
from tptrain.estimate.hosts import host_memory_problems
from tptrain.estimate.roofline import step_tokens
from tptrain.topology import Topology

_MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")
_REMAT, _ACCUMULATION, _ROWS = "remat.policy", "optim.accumulation", "data.batch_rows"
# The settings of a layout, in the order in which people read them.
SEARCHED = (*_MESH, _REMAT, _ROWS, _ACCUMULATION)
# Of the mesh's sizes: the one that stands for what the others leave.
_FILL = "-1"


@dataclass(frozen=True)
class Candidate:
    """A layout that can be planned. changes: its settings, all of `SEARCHED`."""

    changes: Change
    plan: Plan
    found: Estimate

    @property
    def bound_seconds(self) -> float | None:
        """A step by the roofline with nothing overlapped; None for a chip without published numbers."""
        return self.found.roofline.slowest_seconds if self.found.roofline else None

    @property
    def step_tokens(self) -> int:
        return step_tokens(self.found.work)

    @property
    def is_worth_compiling(self) -> bool:
        return self.found.verdict != "does not fit" and not host_memory_problems(self.plan, self.found.hosts)

    @property
    def order(self) -> tuple[float, int]:
        """The better, the smaller: chip-seconds a token by the roofline, then bytes of a chip."""
        seconds = self.bound_seconds
        per_token = math.inf if seconds is None else seconds / self.step_tokens
        return per_token, self.found.memory.total_bytes


@dataclass(frozen=True)
class Refusal:
    """Layouts that break the same rule. problem: that of the first of them."""

    problem: Problem
    count: int


@dataclass
class Survey:
    """The layouts looked at so far: those that can be planned, and what stands before the others."""

    candidates: list[Candidate] = field(default_factory=list)
    refused: list[tuple[Problem, ...]] = field(default_factory=list)

    def look_at(self, recipe: Recipe, layout: Change) -> None:
        changed = apply_overrides(recipe, [f"{path}={value}" for path, value in layout.items()])
        try:
            plan = plan_recipe(changed)
        except ProblemsError as error:
            self.refused.append(error.problems)
        else:
            self.candidates.append(Candidate(layout, plan, estimate(plan)))

    def ranked(self) -> list[Candidate]:
        """The candidates that may fit, the fastest by the roofline first."""
        fitting = [one for one in self.candidates if one.is_worth_compiling]
        return sorted(fitting, key=lambda one: one.order)

    def refusals(self) -> list[Refusal]:
        """The reasons with their counts, most frequent first; a layout counts for its first problem."""
        groups: dict[tuple[str, str], list[Problem]] = {}
        for first, *_ in self.refused:
            groups.setdefault((first.setting, first.rule), []).append(first)
        found = [Refusal(group[0], len(group)) for group in groups.values()]
        return sorted(found, key=lambda refusal: -refusal.count)


def layouts(
    recipe: Recipe, topology: Topology, held: Collection[str] = (), row_multiples: Sequence[int] = (1,)
) -> Iterator[Change]:
    """Every layout of a recipe on a slice; whether it can be planned is not asked.

    Policies that offload are left out where they would offload nothing, unless the recipe's is held.

    held: settings that keep the recipe's value (a mesh size of -1 is not kept). row_multiples: the rows of a
    step, as multiples of the recipe's.
    """
    now = {path: shown(value_of(recipe, settings()[path])) for path in SEARCHED}
    kept = {path: now[path] for path in held if path in SEARCHED and path != _ROWS and now[path] != _FILL}
    # The expert axis is as in the recipe.
    meshes = _meshes(topology.devices_per_slice // max(recipe.mesh.expert, 1))
    policies = [
        policy
        for policy in settings()[_REMAT].choices
        if policy not in OFFLOADED or topology.chip.platform == "tpu" or _REMAT in kept
    ]
    for mesh, policy, multiple in product(meshes, policies, row_multiples):
        rows = multiple * recipe.data.batch_rows
        for count in _divisors(rows):
            sizes = dict(zip(_MESH, map(str, mesh), strict=True))
            layout = {**sizes, _REMAT: policy, _ROWS: str(rows), _ACCUMULATION: str(count)}
            if all(layout[path] == value for path, value in kept.items()):
                yield layout


def _meshes(devices: int) -> list[tuple[int, int, int]]:
    """Sizes of data, fsdp and tensor whose product is the number of devices."""
    return [
        (data, devices // data // tensor, tensor)
        for data in _divisors(devices)
        for tensor in _divisors(devices // data)
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
