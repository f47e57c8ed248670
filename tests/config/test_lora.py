"""Adapters as rows of the table: which projections get them, their shapes, splits, names, bytes."""

from __future__ import annotations

import pytest
from samples import MIXTRAL, small_recipe

from tptrain.config.overrides import apply_overrides
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.estimate import estimate
from tptrain.family import adapted_modules, stored_rows
from tptrain.family.lora import peft_config
from tptrain.report.plan_page import plan_json, plan_page

RANK = ("lora.rank=4", "lora.alpha=10")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
QWEN3_MOE = (
    *("model.config.model_type=qwen3_moe", 'model.config.architectures=["Qwen3MoeForCausalLM"]'),
    *("model.config.num_experts=6", "model.config.num_experts_per_tok=2"),
    *("model.config.moe_intermediate_size=40", "model.config.mlp_only_layers=[1]"),
)


def _plan(*overrides: str) -> Plan:
    return plan_recipe(apply_overrides(small_recipe(), overrides), environ={"HF_HOME": "/nowhere"})


def _adapted(plan: Plan) -> dict[int, list[str]]:
    """Layer -> the modules with adapters, by their last names."""
    found: dict[int, list[str]] = {}
    for module in adapted_modules(plan.table):
        parts = module.split(".")
        found.setdefault(int(parts[2]), []).append(parts[-1])
    return found


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("heads,kv_heads,mlp", [*ATTENTION, *MLP]),
        ("heads", ["q_proj", "o_proj"]),
        ("kv_heads", ["k_proj", "v_proj"]),
        ("mlp", MLP),
        ("embed", [*ATTENTION, *MLP]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("*.self_attn.*,down_proj", [*ATTENTION, "down_proj"]),
        ("?_proj", ATTENTION),
    ],
)
def test_targets_by_dims_names_and_patterns(targets: str, modules: list[str]) -> None:
    plan = _plan(*RANK, f"lora.targets={targets}")
    assert _adapted(plan) == dict.fromkeys(range(3), modules)
    assert peft_config(plan.table, 4, 10.0, None)["target_modules"] == sorted(modules)


def test_targets_in_some_layers_are_named_whole_and_cut_the_loops() -> None:
    plan = _plan(*RANK, "lora.targets=model.layers.[12].mlp.up_proj")
    assert _adapted(plan) == {1: ["up_proj"], 2: ["up_proj"]}
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (1, 2)]
    assert peft_config(plan.table, 4, 10.0, "org/base")["target_modules"] == names
    assert plan.layer_runs.first_back == 1
    assert [list(run.layers) for run in plan.layer_runs.runs] == [[0], [1, 2]]


def test_rows_of_an_adapter() -> None:
    plan = _plan(*RANK, "mesh.fsdp=4", "mesh.tensor=2")
    rows = {row.name: row for row in plan.table}
    for module, (out_dim, in_dim), (out_axis, in_axis), (out_size, in_size) in (
        ("self_attn.q_proj", ("heads", "embed"), ("tensor", "fsdp"), (96, 96)),
        ("self_attn.v_proj", ("kv_heads", "embed"), ("tensor", "fsdp"), (48, 96)),
        ("mlp.down_proj", ("embed", "mlp"), ("fsdp", "tensor"), (96, 176)),
    ):
        a, b = (rows[f"model.layers.2.{module}.lora_{letter}.weight"] for letter in "AB")
        assert (a.dims, a.size, a.init) == (("rank", in_dim), (4, in_size), "kaiming_uniform")
        assert (b.dims, b.size, b.init) == ((out_dim, "rank"), (out_size, 4), "zeros")
        assert plan.specs[a.name][0] == plan.specs[b.name][1] == ()
        assert (in_axis in plan.specs[a.name][1], out_axis in plan.specs[b.name][0]) == (True, True)
        for row in (a, b):
            assert (row.trainable, row.saved, row.decay, row.storage_dtype) == (True, True, True, "float32")
            assert row.in_files == (f"base_model.model.{row.name}",)
    base = [row for row in plan.table if not row.is_adapter]
    assert all((r.trainable, r.saved, r.storage_dtype) == (False, False, "bfloat16") for r in base)
    for part in ("mu", "nu"):
        assert all(row.is_adapter for row in plan.parts[part].rows)
        assert len(plan.parts[part].rows) == 2 * 7 * 3


def test_without_a_rank_nothing_changes() -> None:
    assert _plan("lora.rank=0").table == _plan().table
    assert all(row.saved and row.trainable for row in _plan().table)


def test_of_a_mixture_attention_and_dense_layers_get_adapters() -> None:
    assert _adapted(_plan(*MIXTRAL, *RANK, "lora.targets=heads,kv_heads")) == dict.fromkeys(
        range(3), ATTENTION
    )
    plan = _plan(*QWEN3_MOE, *RANK)
    assert _adapted(plan) == {0: ATTENTION, 1: [*ATTENTION, *MLP], 2: ATTENTION}
    # Experts have modules of these names in files, so whole names say which are meant.
    assert len(peft_config(plan.table, 4, 10.0, None)["target_modules"]) == 3 * 4 + 3


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_bytes_of_state_checkpoint_and_export(form: str) -> None:
    pretrained = ("model.pretrained=org/some-model", "model.tokenizer=pretrained")
    plan = _plan(*RANK, "topology=cpu-1", *pretrained, f"export.lora={form}")
    rows = stored_rows(plan.table)
    adapters = sum(row.num_elements for row in rows if row.is_adapter)
    base = sum(row.num_elements for row in rows) - adapters
    found = estimate(plan)
    assert found.memory.arguments["parameters"] == 4 * adapters + 2 * base
    assert found.memory.arguments["optimizer state"] == 8 * adapters
    assert found.hosts.checkpoint_bytes == 12 * adapters
    assert found.hosts.exported_bytes == 2 * (adapters if form == "adapter" else base)


def test_estimates_count_adapters_once() -> None:
    """FLOPs of the adapters are those of their matrices, three times; the base's own gradients are saved."""
    tokens, chips = 48 * 256, ("topology=v5p-8",)
    plan, few = _plan(*RANK, *chips), _plan("lora.rank=8", *chips)
    flops = [estimate(each).roofline.flops.model for each in (plan, few)]  # type: ignore[union-attr]
    adapters = sum(row.num_elements for row in plan.table if row.is_adapter)
    assert flops[1] - flops[0] == 6 * adapters * tokens
    kept = [estimate(_plan(*RANK, f"remat.policy={policy}")).memory for policy in ("full", "dots")]
    assert kept[0].total_bytes < kept[1].total_bytes


def test_the_plan_tells_of_adapters() -> None:
    page = plan_page(_plan(*RANK, "lora.targets=heads"))
    assert "Adapters: LoRA of rank 4, alpha 10, on q_proj (3 layers), o_proj (3 layers)" in page
    assert plan_json(_plan(*RANK))["recipe"]["lora.targets"] == ["heads", "kv_heads", "mlp"]
    assert "Adapters" not in plan_page(_plan())


def test_the_seed_matters_beside_a_pretrained_model() -> None:
    pretrained = ("model.pretrained=org/some-model", "model.tokenizer=pretrained", "seed=3")
    assert any("seed=3 has no effect" in notice for notice in _plan(*pretrained).notices)
    assert not any("seed=3" in notice for notice in _plan(*pretrained, *RANK).notices)
