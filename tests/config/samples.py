"""Recipes and configs that the tests of tptrain.config share; no two sizes are equal."""

from __future__ import annotations

from tptrain.config import DataSection, ModelSection, Recipe, ScheduleSection

SMALL_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1031,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

# What makes a Mixtral of it, as overrides.
MIXTRAL = (
    *("model.config.model_type=mixtral", 'model.config.architectures=["MixtralForCausalLM"]'),
    *("model.config.num_local_experts=6", "model.config.num_experts_per_tok=2"),
)


def small_recipe(**sections: object) -> Recipe:
    """A recipe that plans without problems on cpu-1 to cpu-16."""
    given: dict[str, object] = {
        "name": "small",
        "topology": "cpu-8",
        "model": ModelSection(config=dict(SMALL_LLAMA), tokenizer="train"),
        "data": DataSection(path="train.jsonl", preset="gsm8k", seq_len=256, batch_rows=48),
        "schedule": ScheduleSection(max_steps=40),
    }
    return Recipe(**{**given, **sections})  # type: ignore[arg-type]
