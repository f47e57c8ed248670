"""Fine-tune Gemma 2 9B on instructions in the form of Alpaca.

Planned for v5p-32, v6e-32 and v4-64.

For example:
    tptrain dryrun recipes/gemma2_9b_alpaca.py topology=v5p-32
    tptrain train recipes/gemma2_9b_alpaca.py model.pretrained=my/gemma-2-9b data.path=my.jsonl
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5p-32", "v6e-32", "v4-64")

# config.json of google/gemma-2-9b.
CONFIG = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
}

RECIPE = Recipe(
    name="gemma2_9b_alpaca",
    model=ModelSection(pretrained="google/gemma-2-9b", config=CONFIG),
    data=DataSection(path="yahma/alpaca-cleaned", preset="alpaca", seq_len=1024, batch_rows=64),
    optim=OptimSection(learning_rate=5e-6),
    schedule=ScheduleSection(epochs=2, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
