"""Fine-tune OLMo 2 7B on GSM8K.

Planned for v5p-32, v6e-16 and v4-32.

For example:
    tptrain dryrun recipes/olmo2_7b_gsm8k.py topology=v5p-32
    tptrain train recipes/olmo2_7b_gsm8k.py model.pretrained=my/OLMo-2-1124-7B data.path=my.jsonl
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5p-32", "v6e-16", "v4-32")

# config.json of allenai/OLMo-2-1124-7B.
CONFIG = {
    "model_type": "olmo2",
    "architectures": ["Olmo2ForCausalLM"],
    "vocab_size": 100352,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
}

RECIPE = Recipe(
    name="olmo2_7b_gsm8k",
    model=ModelSection(pretrained="allenai/OLMo-2-1124-7B", config=CONFIG),
    data=DataSection(path="openai/gsm8k", subset="main", preset="gsm8k", seq_len=512, batch_rows=64),
    optim=OptimSection(learning_rate=1e-5),
    schedule=ScheduleSection(epochs=3, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
