"""Fine-tune Qwen2.5-7B on instructions in the form of Alpaca.

Planned for v5p-32, v6e-16 and v4-32.

For example:
    tptrain dryrun recipes/qwen2_5_7b_alpaca.py topology=v5p-32
    tptrain train recipes/qwen2_5_7b_alpaca.py model.pretrained=my/Qwen2.5-7B data.path=my.jsonl
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5p-32", "v6e-16", "v4-32")

# config.json of Qwen/Qwen2.5-7B.
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
}

RECIPE = Recipe(
    name="qwen2_5_7b_alpaca",
    model=ModelSection(pretrained="Qwen/Qwen2.5-7B", config=CONFIG),
    data=DataSection(path="yahma/alpaca-cleaned", preset="alpaca", seq_len=1024, batch_rows=64),
    optim=OptimSection(learning_rate=1e-5),
    schedule=ScheduleSection(epochs=2, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
