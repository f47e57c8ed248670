"""Fine-tune Llama-3-8B on GSM8K.

Planned for v5p-32, v6e-16, v4-32 and 2xv5p-32. It plans for any slice; training is for slices of one
host so far.

For example:
    tptrain plan recipes/llama3_8b_gsm8k.py topology=v5p-32
    python recipes/llama3_8b_gsm8k.py model.pretrained=my/checkpoint data.path=my.jsonl mesh.tensor=2
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, RematSection, ScheduleSection

# The slices that it is planned for.
TOPOLOGIES = ("v5p-32", "v6e-16", "v4-32", "2xv5p-32")

# config.json of meta-llama/Meta-Llama-3-8B, so that a plan needs no download.
LLAMA3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}

RECIPE = Recipe(
    name="llama3_8b_gsm8k",
    model=ModelSection(pretrained="meta-llama/Meta-Llama-3-8B", config=LLAMA3_8B),
    data=DataSection(path="openai/gsm8k", subset="main", preset="gsm8k", seq_len=512, batch_rows=64),
    optim=OptimSection(learning_rate=1e-5),
    schedule=ScheduleSection(epochs=3, warmup_steps=20, final_ratio=0.1),
    remat=RematSection(policy="full"),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
