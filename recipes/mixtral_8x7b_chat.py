"""Fine-tune Mixtral 8x7B Instruct on conversations.

Planned for v5p-128, v6e-64 and v4-128. An Instruct model's tokenizer has the chat template that
data.preset=chat needs; a base model's has none.

For example:
    tptrain dryrun recipes/mixtral_8x7b_chat.py topology=v5p-128
    tptrain train recipes/mixtral_8x7b_chat.py model.pretrained=my/checkpoint data.path=my.jsonl
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5p-128", "v6e-64", "v4-128")

# config.json of mistralai/Mixtral-8x7B-Instruct-v0.1.
CONFIG = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

RECIPE = Recipe(
    name="mixtral_8x7b_chat",
    model=ModelSection(pretrained="mistralai/Mixtral-8x7B-Instruct-v0.1", config=CONFIG),
    data=DataSection(path="HuggingFaceH4/no_robots", preset="chat", seq_len=2048, batch_rows=64),
    optim=OptimSection(learning_rate=5e-6),
    schedule=ScheduleSection(epochs=2, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
