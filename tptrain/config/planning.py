"""From a recipe to a plan on this machine: finds what `resolve` must be given, then resolves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from tptrain.config.added_tokens import find_num_ids
from tptrain.config.checkpoint_config import find_checkpoint_config, read_config_file
from tptrain.config.local import local_topology
from tptrain.config.model_config import ConfigsAtHand
from tptrain.config.plan import Plan
from tptrain.config.resolve import finish, parts_of
from tptrain.config.schema import Recipe
from tptrain.errors import Problem, ProblemsError, raise_if_any
from tptrain.topology import Topology, parse_topology

_Found = TypeVar("_Found")


def plan_recipe(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> Plan:
    """The plan of a recipe here: topology from the recipe or the environment, configs from disk.

    Raises ProblemsError with all problems together, those of reading and those of resolving.
    """
    problems: list[Problem] = []
    topology = _collect(problems, lambda: find_topology(recipe, environ))
    checkpoint = _collect(problems, lambda: (find_checkpoint_config(recipe, environ),))
    file = _collect(problems, lambda: (read_config_file(recipe),))
    num_ids = _collect(problems, lambda: (find_num_ids(recipe, environ),))
    at_hand = None
    if checkpoint and file and num_ids:
        at_hand = ConfigsAtHand(checkpoint[0], file[0], num_ids[0])
    parts = parts_of(recipe, topology, at_hand)
    raise_if_any([*problems, *parts.problems])
    return finish(parts)


def find_topology(recipe: Recipe, environ: Mapping[str, str]) -> Topology:
    name = local_topology(environ, recipe.backend) if recipe.topology == "auto" else recipe.topology
    return parse_topology(name)


def _collect(problems: list[Problem], find: Callable[[], _Found]) -> _Found | None:
    """What `find` returns, or None with its problems added to the list."""
    try:
        return find()
    except ProblemsError as error:
        problems.extend(error.problems)
        return None
