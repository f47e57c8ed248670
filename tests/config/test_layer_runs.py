"""Layers cut where what is trained changes: runs, names of their stacks, and what the plan says of them."""

from __future__ import annotations

import dataclasses

import pytest
from samples import small_recipe

from tptrain.config import Plan
from tptrain.config.overrides import apply_overrides
from tptrain.config.resolve import resolve
from tptrain.config.trainable import MOST_TRACED
from tptrain.family import LayerKind, LayerRuns, layer_of, layer_runs, stored_rows
from tptrain.family.layer_runs import shortest_runs
from tptrain.report.plan_page import plan_page
from tptrain.topology import parse_topology


def _plan(trainable: str, *overrides: str, layers: int = 7) -> Plan:
    given = [f"model.config.num_hidden_layers={layers}", f"model.trainable={trainable}", *overrides]
    recipe = apply_overrides(small_recipe(), given)
    return resolve(recipe, parse_topology(recipe.topology), None)


def _runs(found: LayerRuns) -> list[tuple[int, int]]:
    return [(run.layers.start, run.layers.stop) for run in found.runs]


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
    assert (_runs(found), found.first_back) == (runs, first_back)
    assert {run.period for run in found.runs} == {1}


def test_a_tied_embedding_is_below_all_layers() -> None:
    plan = _plan("model.embed_tokens.weight,model.layers.6.*", "model.config.tie_word_embeddings=true")
    assert (_runs(plan.layer_runs), plan.layer_runs.first_back) == ([(0, 6), (6, 7)], 0)


_FULL, _SLIDING = LayerKind(), LayerKind(64)


@pytest.mark.parametrize(
    ("layers", "runs"),
    [
        ("AAAA", [(0, 4, 1)]),
        ("ABABAB", [(0, 6, 2)]),
        # Gemma 3 1B and 27B end inside of a period.
        ("AAAAAB" * 4 + "AA", [(0, 24, 6), (24, 26, 1)]),
        ("AAAAAB" * 10 + "AA", [(0, 60, 6), (60, 62, 1)]),
        ("ABABA", [(0, 4, 2), (4, 5, 1)]),
        # Windows in the upper layers alone.
        ("AAAABBBB", [(0, 4, 1), (4, 8, 1)]),
        # What does not repeat is not computed in one turn, which would need the memory of all of it.
        ("ABC", [(0, 1, 1), (1, 2, 1), (2, 3, 1)]),
        ("AAAAAB", [(0, 5, 1), (5, 6, 1)]),
        ("A", [(0, 1, 1)]),
    ],
)
def test_the_cut_with_the_fewest_layers_to_trace(layers: str, runs: list[tuple[int, int, int]]) -> None:
    found = shortest_runs(layers)
    assert [(run.layers.start, run.layers.stop, run.period) for run in found] == runs


def test_layers_of_another_kind_and_with_other_weights_trained_are_not_stacked() -> None:
    rows = stored_rows(_plan("model.layers.3.*,model.layers.5.mlp.*", layers=8).table)
    kinds = [_SLIDING if layer % 2 else _FULL for layer in range(8)]
    found = layer_runs(rows, kinds)
    assert found.first_back == 3
    stacks: dict[str, list[tuple[LayerKind, bool]]] = {}
    for row in rows:
        layer = layer_of(row.name)
        if layer is not None:
            stacks.setdefault(str(found.stack_of(row.name)), []).append((kinds[layer[0]], row.trainable))
    assert all(len(set(members)) == 1 for members in stacks.values())
    assert sum(len(members) for members in stacks.values()) == 8 * 9


def test_stacks_are_named_by_run_and_place_in_the_period() -> None:
    rows = stored_rows(_plan("*", layers=5).table)
    found = layer_runs(rows, [_FULL, _SLIDING, _FULL, _SLIDING, _FULL])
    names = [found.stack_of(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(5)]
    places = ["0.period.0", "0.period.1", "0.period.0", "0.period.1", "1.period.0"]
    assert names == [f"model.layers.{place}.mlp.up_proj.weight" for place in places]


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


def test_the_page_says_how_layers_are_looped_over() -> None:
    text = plan_page(_plan("model.layers.[56].*,model.norm.weight"))
    assert "  Layers: 2 loops, 0..4, 5..6; below layer 5 nothing is kept and nothing goes back.\n" in text
    embedding = plan_page(_plan("model.embed_tokens.weight,model.layers.0.*"))
    assert "  Layers: 2 loops, 0, 1..6.\n" in embedding
    assert "model.layers.{0..4}.mlp.up_proj.weight (frozen)" in text
    assert "\nmodel.layers.{5..6}.mlp.up_proj.weight  " in text
    assert "Layers:" not in plan_page(_plan("*"))
    by_turns = plan_page(_plan("model.layers.[024].*", layers=6))
    assert "  Layers: one loop, 0..5 with a period of 2.\n" in by_turns


def test_many_different_layers_are_told_with_their_number() -> None:
    """Layer i has i of its matrices trained, so none is like another."""
    matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    patterns = [f"model.layers.{i}.*.{name}.*" for i in range(8) for name in matrices[:i]]
    few = _plan(",".join(patterns), layers=MOST_TRACED)
    assert few.notices == ()
    (notice,) = _plan(",".join([*patterns, "model.layers.8.*"]), layers=MOST_TRACED + 1).notices
    assert f"compute {MOST_TRACED + 1} in a turn" in notice
    one = _plan(",".join([*patterns, "model.layers.8.*"]), "backend=torch", "topology=cpu-1", layers=9)
    assert one.notices == ()


def test_a_plan_with_other_facts_is_cut_anew() -> None:
    """The runs are of the table and the kinds of layers, not of the recipe."""
    plan = _plan("model.layers.3.*", layers=8)
    facts = dataclasses.replace(plan.facts, layer_period=(_FULL, _SLIDING))
    cut = dataclasses.replace(plan, facts=facts).layer_runs
    assert cut.traced > plan.layer_runs.traced == 3
