"""Layers cut where what is trained changes: runs, names of their stacks, and what the plan says of them."""

from __future__ import annotations

import dataclasses

import pytest
from samples import small_recipe

from tptrain.config import Plan
from tptrain.config.overrides import apply_overrides
from tptrain.config.resolve import resolve
from tptrain.config.trainable import MOST_RUNS
from tptrain.family import LayerRuns, layer_runs, stored_rows
from tptrain.report.plan_page import plan_page
from tptrain.topology import parse_topology


def _plan(trainable: str, *overrides: str, layers: int = 7) -> Plan:
    given = [f"model.config.num_hidden_layers={layers}", f"model.trainable={trainable}", *overrides]
    recipe = apply_overrides(small_recipe(), given)
    return resolve(recipe, parse_topology(recipe.topology), None)


def _runs(found: LayerRuns) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run in found.runs]


@pytest.mark.parametrize(
    ("trainable", "runs", "first_back"),
    [
        ("*", [(0, 7)], 0),
        ("model.layers.*.self_attn.*", [(0, 7)], 0),
        ("model.layers.6.*,lm_head.weight", [(0, 6), (6, 7)], 6),
        ("model.layers.[56].*", [(0, 5), (5, 7)], 5),
        ("model.layers.2.mlp.*", [(0, 2), (2, 3), (3, 7)], 2),
        ("model.embed_tokens.weight,model.layers.0.*", [(0, 1), (1, 7)], 0),
        ("model.embed_tokens.weight,model.layers.4.*", [(0, 4), (4, 5), (5, 7)], 0),
        # Trained in both, but not the same.
        ("model.layers.[01].mlp.*,model.layers.2.*", [(0, 2), (2, 3), (3, 7)], 0),
        ("model.norm.weight", [(0, 7)], 7),
        ("lm_head.weight", [(0, 7)], 7),
    ],
)
def test_runs_by_hand(trainable: str, runs: list[tuple[int, int]], first_back: int) -> None:
    found = _plan(trainable).layer_runs
    assert (_runs(found), found.first_back, found.period) == (runs, first_back, 1)


def test_a_tied_embedding_is_below_all_layers() -> None:
    plan = _plan("model.embed_tokens.weight,model.layers.6.*", "model.config.tie_word_embeddings=true")
    assert (_runs(plan.layer_runs), plan.layer_runs.first_back) == ([(0, 6), (6, 7)], 0)


def test_a_cut_inside_a_period_falls_on_its_ends() -> None:
    """Of alternating layers one loop turn computes both, each with stacks of its own."""
    rows = stored_rows(_plan("model.layers.3.*,model.layers.5.mlp.*", layers=8).table)
    found = layer_runs(rows, 2)
    assert (_runs(found), found.first_back) == ([(0, 2), (2, 4), (4, 6), (6, 8)], 2)
    assert found.stack_of("model.layers.3.mlp.up_proj.weight") == "model.layers.1.period.1.mlp.up_proj.weight"
    assert found.stack_of("model.layers.2.mlp.up_proj.weight") == "model.layers.1.period.0.mlp.up_proj.weight"
    stacks: dict[str, set[bool]] = {}
    for row in rows:
        stacks.setdefault(found.stack_of(row.name) or row.name, set()).add(row.trainable)
    assert all(len(kinds) == 1 for kinds in stacks.values()), "a stack is trained or frozen as a whole"


def test_one_run_has_no_number_and_rows_outside_have_no_stack() -> None:
    one, two = _plan("*").layer_runs, _plan("model.layers.6.*").layer_runs
    name = "model.layers.6.self_attn.q_proj.weight"
    assert one.stack_of(name) == "model.layers.period.0.self_attn.q_proj.weight"
    assert two.stack_of(name) == "model.layers.1.period.0.self_attn.q_proj.weight"
    assert one.stack_of("lm_head.weight") is two.stack_of("model.norm.weight") is None


def test_runs_are_those_of_all_weights_in_every_part_of_the_state() -> None:
    plan = _plan("model.layers.2.self_attn.*,model.layers.[56].mlp.*")
    names = [row.name for row in plan.parts["mu"].rows]
    assert len(names) == 4 + 2 * 3
    stacks = {plan.layer_runs.stack_of(name) for name in names}
    assert {stack.split(".")[2] for stack in stacks if stack} == {"1", "3"}


def test_the_page_says_where_layers_are_cut() -> None:
    text = plan_page(_plan("model.layers.[56].*,model.norm.weight"))
    assert (
        "  Layers: 2 runs of which the same weights are trained, 0..4, 5..6;"
        " below layer 5 nothing is kept and nothing goes back.\n" in text
    )
    embedding = plan_page(_plan("model.embed_tokens.weight,model.layers.0.*"))
    assert "  Layers: 2 runs of which the same weights are trained, 0, 1..6.\n" in embedding
    assert "model.layers.{0..4}.mlp.up_proj.weight (frozen)" in text
    assert "\nmodel.layers.{5..6}.mlp.up_proj.weight  " in text
    assert "Layers:" not in plan_page(_plan("*"))


def test_many_runs_are_told_with_their_number() -> None:
    every_other = ",".join(f"model.layers.{i}.*" for i in range(1, 2 * MOST_RUNS, 2))
    few = _plan(f"model.layers.{MOST_RUNS - 1}.*", layers=MOST_RUNS + 1)
    assert few.notices == ()
    (notice,) = _plan(every_other, layers=2 * MOST_RUNS).notices
    assert f"cuts the layers into {2 * MOST_RUNS} runs" in notice
    one = _plan(every_other, "backend=torch", "topology=cpu-1", layers=2 * MOST_RUNS)
    assert one.notices == ()


def test_a_plan_with_other_facts_is_cut_anew() -> None:
    """The runs are of the table and the period, not of the recipe."""
    plan = _plan("model.layers.3.*", layers=8)
    kind = plan.facts.layer_period[0]
    facts = dataclasses.replace(plan.facts, layer_period=(kind, dataclasses.replace(kind, window=64)))
    assert _runs(dataclasses.replace(plan, facts=facts).layer_runs) == [(0, 2), (2, 4), (4, 8)]
