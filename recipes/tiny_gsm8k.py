"""A small Llama from random weights on GSM8K: the whole path in minutes, on a CPU or one chip.

For example:
    tptrain train recipes/tiny_gsm8k.py data.path=train.jsonl
    CPU_NUM_DEVICES=8 tptrain train recipes/tiny_gsm8k.py data.path=train.jsonl mesh.fsdp=4 mesh.tensor=2
"""

from tptrain.cli import run_recipe
from tptrain.config import DataSection, ModelSection, OptimSection, Recipe, SaveSection, ScheduleSection

# Heads of 32: vLLM's attention on CPU takes none smaller.
TINY_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

RECIPE = Recipe(
    name="tiny_gsm8k",
    model=ModelSection(config=TINY_LLAMA, tokenizer="train"),
    data=DataSection(path="openai/gsm8k", subset="main", preset="gsm8k", seq_len=256, batch_rows=16),
    optim=OptimSection(learning_rate=3e-3),
    schedule=ScheduleSection(max_steps=100, warmup_steps=10, final_ratio=0.1),
    save=SaveSection(every_steps=50),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
