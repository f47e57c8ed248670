"""From a recipe to a plan: pure functions of the recipe, the topology and the configs at hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tptrain.config.chat_templates import asked_tokens
from tptrain.config.idle_settings import idle_notices
from tptrain.config.kernels import ChosenAttention, ChosenExperts, choose_attention, choose_experts
from tptrain.config.loss_chunks import chunk_notices, chunk_problems
from tptrain.config.mesh_checks import (
    ChosenMesh,
    ShardingCase,
    batch_problems,
    choose_mesh,
    choose_rules,
    padded_table,
    sharding_problems,
)
from tptrain.config.model_config import ChosenConfig, ConfigsAtHand, choose_config
from tptrain.config.plan import Plan
from tptrain.config.recipe_checks import facts_problems, recipe_problems
from tptrain.config.remat import offload_notices
from tptrain.config.schema import Recipe
from tptrain.config.trainable import (
    frozen_row_problems,
    lora_problems,
    run_notices,
    table_of,
    trainable_problems,
    with_frozen,
)
from tptrain.errors import Problem, raise_if_any
from tptrain.family import parameter_table
from tptrain.mesh import RuleTable, param_specs
from tptrain.topology import Topology


def resolve(
    recipe: Recipe,
    topology: Topology,
    hf_config: Mapping[str, Any] | None,
    file_config: Mapping[str, Any] | None = None,
    num_ids: int = 0,
) -> Plan:
    """The plan of a recipe on a topology. No device, file or network is looked at.

    hf_config:   the config.json found in the checkpoint at hand, None when there is none.
    file_config: the one that `model.config` names, when it is a path.
    num_ids:     of the tokenizer with the tokens that the recipe adds; 0: the config has room for them.

    Raises ProblemsError with every problem there is.
    """
    return finish(parts_of(recipe, topology, ConfigsAtHand(hf_config, file_config, num_ids)))


@dataclass(frozen=True)
class Parts:
    """A recipe on its way to a plan: what could be worked out, None for what a problem stands before."""

    recipe: Recipe
    topology: Topology | None
    model: ChosenConfig | None
    mesh: ChosenMesh | None
    rules: RuleTable | None
    attention: ChosenAttention | None
    experts: ChosenExperts | None
    problems: tuple[Problem, ...]


def parts_of(recipe: Recipe, topology: Topology | None, at_hand: ConfigsAtHand | None) -> Parts:
    """Check everything that can be checked. topology, at_hand: None when reading them failed already."""
    model = choose_config(recipe.model, at_hand) if at_hand else None
    mesh = choose_mesh(recipe.mesh, topology) if topology else None
    rules, rules_problems = choose_rules(recipe.mesh)
    attention = choose_attention(recipe, topology) if topology else None
    problems = [
        *recipe_problems(recipe),
        *chunk_problems(recipe),
        *(model.problems if model else ()),
        *_backend_problems(recipe, topology),
        *(mesh.problems if mesh else ()),
        *rules_problems,
        *(attention.problems if attention else ()),
    ]
    facts, experts = model.facts if model else None, None
    if facts and topology:
        experts = choose_experts(recipe, topology, facts)
        problems += experts.problems
    if model and facts:
        makes_tokenizer = recipe.model.tokenizer == "train"
        num_added = len(asked_tokens(recipe.model)) if makes_tokenizer else 0
        problems += facts_problems(recipe, facts, num_added)
        problems += trainable_problems(recipe, parameter_table(facts))
        problems += lora_problems(recipe, parameter_table(facts))
        problems += frozen_row_problems(recipe, facts, model.new_rows)
    if topology and mesh and rules:
        if facts:
            case = ShardingCase(recipe.mesh, facts, rules, mesh.shape, topology.devices_per_slice)
            problems += sharding_problems(case, parameter_table(facts))
        if mesh.complete:
            problems += batch_problems(recipe, rules, mesh.shape)
    return Parts(recipe, topology, model, mesh, rules, attention, experts, tuple(problems))


def _backend_problems(recipe: Recipe, topology: Topology | None) -> list[Problem]:
    if recipe.backend != "torch" or topology is None:
        return []
    if topology.chip.platform == "cpu" and topology.num_devices == 1:
        return []
    rule, other = "must be one CPU device", "backend=torch"
    return [Problem("topology", topology.name, rule, other, "cpu-1, or backend=xla")]


def finish(parts: Parts) -> Plan:
    """The plan, now that nothing stands before it. Raises ProblemsError otherwise."""
    raise_if_any(parts.problems)
    recipe, topology, model, mesh, rules = parts.recipe, parts.topology, parts.model, parts.mesh, parts.rules
    attention, experts = parts.attention, parts.experts
    assert topology and mesh and rules and attention, "every part is there when there are no problems"
    assert experts
    assert model and model.facts and model.config
    if mesh.shape.axis_sizes["expert"] == 1:
        # So that the specs of a model without experts read as if there were none.
        rules = rules.without("expert")
    master = recipe.precision.master
    padded = padded_table(table_of(model.facts, recipe.lora), rules, mesh.shape.axis_sizes, master)
    table = with_frozen(padded, recipe)
    plan = Plan(
        recipe=recipe,
        topology=topology,
        mesh=mesh.shape,
        rules=rules,
        facts=model.facts,
        hf_config=model.config,
        table=table,
        specs=param_specs(table, rules),
        splash=attention.blocks,
        experts=experts.core,
        micro_rows=recipe.data.batch_rows // recipe.optim.accumulation,
        output_dir=recipe.run_folder,
        export_dir=_export_dir(recipe),
        new_rows=model.new_rows,
        notices=(
            *model.notices,
            *attention.notices,
            *experts.notices,
            *offload_notices(recipe, topology),
            *idle_notices(recipe, topology),
        ),
    )
    chunk = chunk_notices(recipe, plan.loss_chunk_tokens, plan.logits_token_bytes)
    return replace(plan, notices=(*plan.notices, *chunk, *run_notices(recipe, plan.layer_runs)))


def _export_dir(recipe: Recipe) -> str | None:
    if not recipe.export.enabled:
        return None
    return os.path.join(recipe.run_folder, "export") if recipe.export.path == "auto" else recipe.export.path
