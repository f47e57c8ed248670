"""Fine-tune Llama-3.2-1B on GSM8K.

Planned for v5e-8, v6e-8, v5p-16 and v4-16.

For example:
    tptrain dryrun recipes/llama3_2_1b_gsm8k.py topology=v5e-8
    tptrain train recipes/llama3_2_1b_gsm8k.py model.pretrained=my/Llama-3.2-1B data.path=my.jsonl
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5e-8", "v6e-8", "v5p-16", "v4-16")

# config.json of meta-llama/Llama-3.2-1B.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}

RECIPE = Recipe(
    name="llama3_2_1b_gsm8k",
    model=ModelSection(pretrained="meta-llama/Llama-3.2-1B", config=CONFIG),
    data=DataSection(path="openai/gsm8k", subset="main", preset="gsm8k", seq_len=512, batch_rows=64),
    optim=OptimSection(learning_rate=1e-5),
    schedule=ScheduleSection(epochs=3, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
