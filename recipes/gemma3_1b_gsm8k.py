"""Fine-tune Gemma 3 1B on GSM8K.

Planned for v5e-8, v6e-8, v5p-16 and v4-16.

For example:
    tptrain dryrun recipes/gemma3_1b_gsm8k.py topology=v5e-8
    tptrain train recipes/gemma3_1b_gsm8k.py model.pretrained=my/gemma-3-1b-pt data.path=my.jsonl
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5e-8", "v6e-8", "v5p-16", "v4-16")

# config.json of google/gemma-3-1b-pt.
CONFIG = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}

RECIPE = Recipe(
    name="gemma3_1b_gsm8k",
    model=ModelSection(pretrained="google/gemma-3-1b-pt", config=CONFIG),
    data=DataSection(path="openai/gsm8k", subset="main", preset="gsm8k", seq_len=512, batch_rows=64),
    optim=OptimSection(learning_rate=1e-5),
    schedule=ScheduleSection(epochs=3, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
