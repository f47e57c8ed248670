"""Fine-tune Mistral 7B Instruct on conversations.

Planned for v5p-32, v6e-16 and v4-32. An Instruct model's tokenizer has the chat template that
data.preset=chat needs; a base model's has none.

For example:
    tptrain dryrun recipes/mistral_7b_chat.py topology=v5p-32
    tptrain train recipes/mistral_7b_chat.py model.pretrained=my/Mistral-7B-Instruct-v0.3 data.path=my.jsonl
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5p-32", "v6e-16", "v4-32")

# config.json of mistralai/Mistral-7B-Instruct-v0.3.
CONFIG = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "rope_theta": 1000000.0,
}

RECIPE = Recipe(
    name="mistral_7b_chat",
    model=ModelSection(pretrained="mistralai/Mistral-7B-Instruct-v0.3", config=CONFIG),
    data=DataSection(path="HuggingFaceH4/no_robots", preset="chat", seq_len=2048, batch_rows=32),
    optim=OptimSection(learning_rate=5e-6),
    schedule=ScheduleSection(epochs=2, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
