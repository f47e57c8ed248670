"""Every recipe plans on the slices it names, fits there, and comes to what its golden file says."""

from __future__ import annotations

import pytest
from golden_recipes import GOLDEN, NAMES, golden_text, plan_of, topologies

from tptrain.estimate import estimate
from tptrain.estimate.memory import verdict
from tptrain.family import families

CASES = [(name, topology) for name in NAMES for topology in topologies(name)]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_comes_to_its_golden_file(name: str) -> None:
    """After a change that is meant, `python tests/config/golden_recipes.py` writes the files anew."""
    assert golden_text(name) == (GOLDEN / f"{name}.json").read_text()


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_it_fits(name: str, topology: str) -> None:
    plan = plan_of(name, topology)
    assert verdict(estimate(plan).memory.total_bytes, plan.topology.chip.hbm_bytes) == "fits"


def test_every_file_has_a_recipe_and_every_family_one() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(NAMES)
    assert {plan_of(name, topology).facts.family for name, topology in CASES} == set(families())
