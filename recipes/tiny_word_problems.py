"""A small Llama from random weights learns embedded word problems: the quickstart, with no download.

For example:
    tptrain train recipes/tiny_word_problems.py
"""

from tptrain.cli import run_recipe
from tptrain.config import (
    DataSection,
    EvalSection,
    ModelSection,
    OptimSection,
    PrecisionSection,
    Recipe,
    ScheduleSection,
)

TINY_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 576,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}

RECIPE = Recipe(
    name="tiny_word_problems",
    seed=1,
    model=ModelSection(config=TINY_LLAMA, tokenizer="train"),
    data=DataSection(path="builtin:word_problems", preset="gsm8k", seq_len=96, batch_rows=16),
    optim=OptimSection(learning_rate=3e-3, beta2=0.99),
    schedule=ScheduleSection(max_steps=1100, warmup_steps=40),
    precision=PrecisionSection(compute="float32"),
    eval=EvalSection(problems=200, path="builtin:word_problems", max_new_tokens=64),
)

if __name__ == "__main__":
    run_recipe(RECIPE)
