"""Llamas of published sizes on TPU slices, planned as the benchmarks of compiled programs want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.config.overrides import apply_overrides
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.topology import parse_topology

ROOT = Path(__file__).parents[2]
_RECIPE = ROOT / "recipes" / "llama3_8b_gsm8k.py"

# The fields in which the others differ from Llama 3 8B, whose config the recipe has: Llama 3.2 1B and 3B,
# Llama 3 70B and Llama 3.1 405B; Mixtral 8x7B and Qwen3 30B-A3B, and for each a dense model in which a token
# meets as many parameters.
_QWEN3 = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rope_theta": 1_000_000.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "8b": {},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": "true",
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": "true",
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "405b": {
        "hidden_size": 16_384,
        "intermediate_size": 53_248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
    "8x7b": {
        "model_type": "mixtral",
        "architectures": '["MixtralForCausalLM"]',
        "vocab_size": 32_000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32_768,
    },
    "8x7b-active": {"vocab_size": 32_000, "intermediate_size": 2 * 14_336},
    "30b-a3b": {
        **{"model_type": "qwen3_moe", "architectures": '["Qwen3MoeForCausalLM"]'},
        **_QWEN3,
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        "norm_topk_prob": "true",
    },
    "30b-a3b-active": {
        **{"model_type": "qwen3", "architectures": '["Qwen3ForCausalLM"]'},
        **_QWEN3,
        "intermediate_size": 8 * 768,
    },
}


@dataclass(frozen=True)
class Case:
    """A train step. rows: per chip. settings: more of the recipe, as `name=value`."""

    model: str
    topology: str
    seq: int
    rows: int
    remat: str
    settings: Sequence[str] = ()

    def __str__(self) -> str:
        more = "".join(f" {setting}" for setting in self.settings)
        return f"{self.model} {self.topology} {self.seq}x{self.rows} {self.remat}{more}"


def plan_of(case: Case) -> Plan:
    settings = {
        **{f"model.config.{name}": value for name, value in MODELS[case.model].items()},
        "topology": case.topology,
        "data.path": "train.jsonl",
        "data.seq_len": case.seq,
        "data.batch_rows": case.rows * parse_topology(case.topology).num_devices,
        "remat.policy": case.remat,
    }
    overrides = [*(f"{name}={value}" for name, value in settings.items()), *case.settings]
    return plan_recipe(apply_overrides(load_recipe(str(_RECIPE)), overrides))
