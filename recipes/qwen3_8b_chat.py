"""Fine-tune Qwen3-8B on conversations.

Planned for v5p-32, v6e-16 and v4-32. Qwen3's own chat template writes earlier answers otherwise than
the last, so conversations of several turns are dropped, unless one with {% generation %} takes its place.

For example:
    tptrain dryrun recipes/qwen3_8b_chat.py topology=v5p-32
    tptrain train recipes/qwen3_8b_chat.py model.pretrained=my/Qwen3-8B data.path=my.jsonl
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5p-32", "v6e-16", "v4-32")

# config.json of Qwen/Qwen3-8B.
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "head_dim": 128,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
}

RECIPE = Recipe(
    name="qwen3_8b_chat",
    model=ModelSection(pretrained="Qwen/Qwen3-8B", config=CONFIG),
    data=DataSection(path="HuggingFaceH4/no_robots", preset="chat", seq_len=2048, batch_rows=32),
    optim=OptimSection(learning_rate=1e-5),
    schedule=ScheduleSection(epochs=2, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
