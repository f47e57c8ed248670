"""Fine-tune Qwen3-30B-A3B on instructions in the form of Alpaca.

Planned for v5p-64, v6e-64 and v4-64.

For example:
    tptrain dryrun recipes/qwen3_30b_a3b_alpaca.py topology=v5p-64
    tptrain train recipes/qwen3_30b_a3b_alpaca.py model.pretrained=my/Qwen3-30B-A3B data.path=my.jsonl
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5p-64", "v6e-64", "v4-64")

# config.json of Qwen/Qwen3-30B-A3B.
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

RECIPE = Recipe(
    name="qwen3_30b_a3b_alpaca",
    model=ModelSection(pretrained="Qwen/Qwen3-30B-A3B", config=CONFIG),
    data=DataSection(path="yahma/alpaca-cleaned", preset="alpaca", seq_len=1024, batch_rows=64),
    optim=OptimSection(learning_rate=1e-5),
    schedule=ScheduleSection(epochs=2, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
