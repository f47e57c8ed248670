"""Facts and parameter tables of mixtures of experts equal what transformers says and saves of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published import PUBLISHED
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tests import families
from tptrain.errors import ProblemsError
from tptrain.family import facts_from_config, parameter_table, stored_rows
from tptrain.family.facts import ExpertFacts
from tptrain.mesh import param_specs
from tptrain.mesh.rules import STYLES

MIXTRAL, QWEN3_MOE = (PUBLISHED[name][0] for name in ("Mixtral-8x7B", "Qwen3-30B-A3B"))
# Billions of parameters that a token meets, as their publishers say.
USED = {"Mixtral-8x7B": 12.9, "Mixtral-8x22B": 39, "Qwen3-30B-A3B": 3.3, "Qwen3-235B-A22B": 22}


def _sized(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A config of small sizes."""
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 6}
    return {**base, **sizes, "num_attention_heads": 8, **more}


def _files(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name in files -> shape, by our table."""
    rows = stored_rows(parameter_table(facts_from_config(config)))
    return {name: size for row in rows for name, size in row.file_sizes.items()}


@pytest.mark.parametrize("name", USED)
def test_parameters_that_a_token_meets(name: str) -> None:
    facts = facts_from_config(PUBLISHED[name][0])
    rows, experts = stored_rows(parameter_table(facts)), facts.experts
    assert experts is not None
    share = experts.num_experts_per_tok / experts.num_experts
    met = sum(row.num_elements * (share if row.is_in_slices else 1) for row in rows)
    assert met / 1e9 == pytest.approx(USED[name], rel=0.02)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_table_equals_the_file_written(name: str, tmp_path: Path) -> None:
    families.model_of(name).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert _files(families.CONFIGS[name]) == written
    config = json.loads((tmp_path / "config.json").read_text())
    assert facts_from_config(config) == facts_from_config(families.CONFIGS[name])


def _experts(config: dict[str, Any]) -> ExpertFacts:
    experts = facts_from_config(config).experts
    assert experts is not None
    return experts


def test_what_the_published_configs_say_of_experts() -> None:
    assert _experts(MIXTRAL) == ExpertFacts(8, 2, 14336, True)
    assert _experts(QWEN3_MOE) == ExpertFacts(128, 8, 768, True)
    for config in (MIXTRAL, QWEN3_MOE):
        sized = _sized(config)
        with_router = {**sized, "output_router_logits": True}
        assert _experts({**with_router, "router_aux_loss_coef": 0.5}).router_loss_coef == 0.5
        assert _experts({**sized, "router_aux_loss_coef": 0.5}).router_loss_coef == 0


@pytest.mark.parametrize(
    ("changes", "has_experts"),
    [
        ({}, [True] * 6),
        ({"mlp_only_layers": [0, 4]}, [False, True, True, True, False, True]),
        ({"decoder_sparse_step": 2}, [False, True] * 3),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [False, True, False, False, False, True]),
        ({"mlp_only_layers": list(range(6))}, [False] * 6),
    ],
)
def test_layers_without_experts(changes: dict[str, Any], has_experts: list[bool]) -> None:
    """As many and the same as in transformers; a model of MLPs alone has no experts to speak of."""
    config = _sized(QWEN3_MOE, moe_intermediate_size=24, **changes)
    facts = facts_from_config(config)
    assert [kind.has_experts for kind in facts.layer_kinds] == has_experts
    assert (facts.experts is not None) == any(has_experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert _files(config).keys() == revert_weight_conversion(model, model.state_dict()).keys()
    units = facts.dim_units()
    assert ("mlp" in units) == (not all(has_experts))
    assert ("expert_mlp" in units) == ("experts" in units) == any(has_experts)


def test_dims_and_rules_of_experts() -> None:
    rows = {row.name: row for row in parameter_table(facts_from_config(MIXTRAL))}
    prefix = "model.layers.31.mlp"
    router, up, down = (
        rows[f"{prefix}.{name}.weight"] for name in ("gate", "experts.up_proj", "experts.down_proj")
    )
    assert (router.size, router.dims) == ((8, 4096), ("router", "embed"))
    assert (up.size, up.dims) == ((8, 14336, 4096), ("experts", "expert_mlp", "expert_embed"))
    assert (down.size, down.dims) == ((8, 4096, 14336), ("experts", "expert_embed", "expert_mlp"))
    assert all(row.decay for row in (router, up, down))
    specs = param_specs(rows.values(), STYLES["fsdp+tensor"])
    assert specs[router.name] == ((), ("fsdp", "expert"))
    assert specs[up.name] == (("expert",), ("tensor",), ("fsdp",))
    assert specs[down.name] == (("expert",), ("fsdp",), ("tensor",))
    assert param_specs([up], STYLES["fsdp"])[up.name] == (("expert",), (), ("fsdp",))


@pytest.mark.parametrize(
    ("base", "changes", "setting"),
    [
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        (MIXTRAL, {"num_local_experts": 0}, "num_local_experts"),
        (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act"),
        (QWEN3_MOE, {"mlp_only_layers": [6]}, "mlp_only_layers"),
        (QWEN3_MOE, {"mlp_only_layers": "0"}, "mlp_only_layers"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN3_MOE, {"num_local_experts": 64}, "num_experts"),
        (QWEN3_MOE, {"norm_topk_prob": 1}, "norm_topk_prob"),
    ],
)
def test_what_is_not_computed_is_refused(base: dict[str, Any], changes: dict[str, Any], setting: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        facts_from_config(_sized(base, **changes))
    assert [problem.setting for problem in caught.value.problems] == [f"model.config.{setting}"]
