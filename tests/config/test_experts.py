"""Facts and parameter tables of mixtures of experts equal what transformers says and saves of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tests import families
from tptrain.errors import ProblemsError
from tptrain.family import facts_from_config, parameter_table, stored_rows
from tptrain.family.facts import ExpertFacts
from tptrain.mesh import param_specs
from tptrain.mesh.rules import STYLES

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "output_router_logits": False,
    "tie_word_embeddings": False,
}
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}


def _sized(base: dict[str, Any], hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**base, **sizes, "num_attention_heads": heads, **more}


# Name -> (config.json as published, parameters in all, and billions of them that a token meets as published).
PUBLISHED: dict[str, tuple[dict[str, Any], int, float]] = {
    "Mixtral-8x7B": (
        _sized(MIXTRAL, 4096, 14336, 32, 32, max_position_embeddings=32768, router_aux_loss_coef=0.02),
        46_702_792_704,
        12.9,
    ),
    "Mixtral-8x22B": (
        _sized(MIXTRAL, 6144, 16384, 56, 48, max_position_embeddings=65536, router_aux_loss_coef=0.001),
        140_620_634_112,
        39,
    ),
    "Qwen3-30B-A3B": (
        _sized(QWEN3_MOE, 2048, 6144, 48, 32, moe_intermediate_size=768),
        30_532_122_624,
        3.3,
    ),
    "Qwen3-235B-A22B": (
        _sized(QWEN3_MOE, 4096, 12288, 94, 64, moe_intermediate_size=1536),
        235_093_634_560,
        22,
    ),
}


def _files(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name in files -> shape, by our table."""
    rows = stored_rows(parameter_table(facts_from_config(config)))
    return {name: size for row in rows for name, size in row.file_sizes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_table_of_a_published_model(name: str) -> None:
    """In files: what save_pretrained makes of the state dict before it writes it."""
    config, count, used = PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    saved = {n: tuple(t.shape) for n, t in revert_weight_conversion(model, model.state_dict()).items()}
    assert _files(config) == saved
    facts = facts_from_config(config)
    rows = stored_rows(parameter_table(facts))
    assert sum(row.num_elements for row in rows) == count
    assert facts.experts is not None
    idle = sum(row.num_elements for row in rows if row.is_in_slices) * (
        1 - facts.experts.num_experts_per_tok / facts.experts.num_experts
    )
    assert (count - idle) / 1e9 == pytest.approx(used, rel=0.02)


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
    by_name = {name: _experts(config) for name, (config, *_) in PUBLISHED.items()}
    assert by_name["Mixtral-8x7B"] == ExpertFacts(8, 2, 14336, True)
    assert by_name["Qwen3-30B-A3B"] == ExpertFacts(128, 8, 768, True)
    for config in (MIXTRAL, QWEN3_MOE):
        sized = _sized(config, 64, 32, 2, 8)
        with_router = {**sized, "output_router_logits": True}
        assert _experts({**with_router, "router_aux_loss_coef": 0.5}).router_loss_coef == 0.5
        assert _experts({**sized, "router_aux_loss_coef": 0.5}).router_loss_coef == 0


@pytest.mark.parametrize("base", [MIXTRAL, QWEN3_MOE])
def test_defaults_are_those_of_transformers(base: dict[str, Any]) -> None:
    """Fields that a config.json leaves out mean the same here as in transformers."""
    short = {name: base[name] for name in ("model_type", "vocab_size")}
    short = _sized(short, 64, 48, 3, 8, output_router_logits=True)
    if base is QWEN3_MOE:
        short["head_dim"] = 16  # transformers 4 and 5 have different ones
    assert facts_from_config(short) == facts_from_config(AutoConfig.for_model(**short).to_dict())
    assert facts_from_config(short).rope.theta == (1e6 if base is MIXTRAL else 10000.0)


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
    config = _sized(QWEN3_MOE, 64, 48, 6, 8, moe_intermediate_size=24, **changes)
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
    rows = {row.name: row for row in parameter_table(facts_from_config(PUBLISHED["Mixtral-8x7B"][0]))}
    prefix = "model.layers.31.mlp"
    router, up, down = (
        rows[f"{prefix}.{name}.weight"] for name in ("gate", "experts.up_proj", "experts.down_proj")
    )
    assert (router.size, router.dims) == ((8, 4096), ("router", "embed"))
    assert (up.size, up.dims) == ((8, 14336, 4096), ("experts", "expert_mlp", "expert_embed"))
    assert (down.size, down.dims) == ((8, 4096, 14336), ("experts", "expert_embed", "expert_mlp"))
    assert all(row.decay for row in (router, up, down))
    specs = param_specs(rows.values(), STYLES["fsdp+tensor"])
    assert specs[router.name] == ((), ("fsdp",))
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
        facts_from_config(_sized(base, 64, 48, 6, 8, **changes))
    assert [problem.setting for problem in caught.value.problems] == [f"model.config.{setting}"]
