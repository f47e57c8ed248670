"""What is proposed for a step that does not fit: the cheapest kind of change that is enough, and it fits."""

from __future__ import annotations

import pytest

from tests.estimate.workloads import llama3_plan, small_plan
from tptrain.config import Plan
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.errors import Problem
from tptrain.estimate import estimate, memory_problems
from tptrain.estimate.changes import first_change_that_fits, fitted_to_compiled

LONG = ("model.config.max_position_embeddings=524288",)
# Overrides of Llama-3-8B -> the settings that are proposed.
CASES = {
    # 8 rows of scores kept by every layer.
    "remat": (("v6e-16", 2048, 32, "remat.policy=none"), {"remat.policy"}),
    "micro-batches": (("v6e-16", 2048, 512), {"optim.accumulation"}),
    "both": (("v6e-16", 4096, 96, "remat.policy=none"), {"remat.policy", "optim.accumulation"}),
    # 8B on 8 chips of 16 GiB: half of the moments are enough for one row a chip, none of them for eight.
    "moments": (("v5e-8", 2048, 8), {"optim.moments_dtype"}),
    "optimizer": (("v5e-8", 2048, 64), {"optim.name", "optim.accumulation"}),
    # One row on each chip, whose layer inputs take half of its memory.
    "offload": (("v6e-16", 65536, 16, "kernels.attention=splash", *LONG), {"remat.policy"}),
    "offload already": (
        ("v6e-16", 8192, 256, "kernels.attention=splash", "remat.policy=offload"),
        {"optim.accumulation"},
    ),
    "replicas": (("v6e-16", 1024, 16, "mesh.data=8", "mesh.fsdp=2"), {"mesh.data", "mesh.fsdp"}),
    "more chips": (("v5e-4", 512, 64), {"topology"}),
    "more chips than rows": (("v5e-4", 512, 4), {"topology", "data.batch_rows"}),
    "another chip": (("v5e-256", 16384, 256, *LONG), {"topology"}),
    "shorter rows": (("v5p-32", 524288, 16, *LONG), {"data.seq_len"}),
}


def _problem(plan: Plan) -> Problem:
    (problem,) = memory_problems(plan, estimate(plan))
    return problem


def _changed(plan: Plan, fix: str) -> Plan:
    """The plan with the first of the proposals taken over, as a user would."""
    given = dict(override.split("=") for override in fix.split(", or ")[0].split())
    return plan_recipe(apply_overrides(plan.recipe, [f"{k}={v}" for k, v in given.items()]), {"HF_HOME": "/"})


@pytest.mark.parametrize("name", CASES)
def test_the_proposed_change_fits(name: str) -> None:
    arguments, settings = CASES[name]
    plan = llama3_plan(*arguments)
    problem = _problem(plan)
    first = problem.fix.split(", or ")[0]
    assert {override.split("=")[0] for override in first.split()} == settings
    assert problem.setting.split(", ") == [override.split("=")[0] for override in first.split()]
    assert estimate(_changed(plan, problem.fix)).verdict == "fits"


def test_no_smaller_number_of_micro_batches_would_do() -> None:
    plan = llama3_plan(*CASES["micro-batches"][0])
    count = int(_problem(plan).fix.removeprefix("optim.accumulation="))
    assert count > 2
    for each in (c for c in range(1, count) if 512 // 16 % c == 0):
        assert estimate(_changed(plan, f"optim.accumulation={each}")).verdict != "fits"


def test_where_it_takes_other_chips_training_fewer_weights_is_proposed_too() -> None:
    plan = llama3_plan("v5e-4", 512, 64)
    chips, fewer = _problem(plan).fix.split(", or ")
    assert chips.startswith("topology=") and "model.trainable=model.layers.*.self_attn.*" in fewer
    assert estimate(_changed(plan, fewer)).verdict == "fits"
    # Nothing is left to freeze where that is what is trained.
    frozen = llama3_plan("v5e-4", 16384, 64, "model.trainable=model.layers.*.self_attn.*", *LONG)
    assert "model.trainable" not in _problem(frozen).fix


def test_what_the_compiler_counted_takes_the_place_of_the_estimate() -> None:
    plan = llama3_plan("v5e-8", 512, 8)
    found = estimate(plan)
    assert first_change_that_fits(plan, fitted_to_compiled(found, found.memory.total_bytes)) == (
        first_change_that_fits(plan)
    )
    # Five times the temporaries: moments of half the size are no longer enough.
    more = found.memory.argument_bytes + 5 * found.memory.temporary_bytes
    change = first_change_that_fits(plan, fitted_to_compiled(found, more))
    assert change is not None and "topology" in change


def test_the_problem_says_both_numbers_and_the_largest_part() -> None:
    problem = _problem(llama3_plan("v5e-4", 512, 64))
    assert (problem.setting, problem.value) == ("topology", "v5e-4")
    assert problem.rule == "needs more memory than a chip has, by the estimate"
    assert " of the 15.75 GiB that a v5e chip lets a program use" in problem.other
    assert "largest part: optimizer state, 14.96 GiB" in problem.other
    assert problem.fix.startswith("topology=v5e-16, or model.trainable=")


def test_what_nothing_can_hold_needs_a_smaller_model() -> None:
    """A vocabulary so large that no chip can hold its embedding as a whole."""
    problem = _problem(llama3_plan("v5p-32", 512, 16, "model.config.vocab_size=30000000"))
    assert (problem.setting, problem.value, problem.fix) == ("topology", "v5p-32", "a smaller model")


def test_what_fits_or_has_no_limit_is_no_problem() -> None:
    for plan in (small_plan(), llama3_plan("v5p-32", 512, 64)):
        assert memory_problems(plan, estimate(plan)) == []


def test_tight_is_said_and_not_refused() -> None:
    found = {rows: estimate(llama3_plan("v6e-16", 1024, rows)) for rows in range(96, 384, 16)}
    tight = [rows for rows, each in found.items() if each.verdict == "tight"]
    assert tight
    for rows in tight:
        assert memory_problems(llama3_plan("v6e-16", 1024, rows), found[rows]) == []
