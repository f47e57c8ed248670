"""A small pretrained folder, a small data set and the recipe that joins them, for tests of whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from tptrain.config import (
    DataSection,
    LogSection,
    MeshSection,
    ModelSection,
    OptimSection,
    PrecisionSection,
    Recipe,
    SaveSection,
    ScheduleSection,
)
from tptrain.data.tokenizer import train_tokenizer
from tptrain.data.word_problems import training_records


def write_records(path: Path, count: int = 400) -> Path:
    """Word problems as JSONL with the columns question and answer."""
    lines = [json.dumps(dict(record)) for record in training_records(count, seed=3)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_pretrained(folder: Path, **config: Any) -> Path:
    """A random Llama with a real tokenizer, as a Hugging Face folder.

    Heads are 8 and kv heads 4, the vocabulary (391) is divisible by no mesh axis, and the weights are large
    enough for the logits to depend on every part of the model.
    """
    set_seed(11)
    texts = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in training_records(300, seed=3)]
    tokenizer = train_tokenizer(texts, 391)
    fields = {
        "vocab_size": 391,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_recipe(
    pretrained: Path, records: Path, output_dir: Path | str, mesh: MeshSection | None = None, **top: Any
) -> Recipe:
    """20 steps of 8 rows in float32; `top` replaces settings at the top of the recipe or whole sections."""
    sections = {
        "model": ModelSection(pretrained=str(pretrained)),
        "data": DataSection(path=str(records), preset="gsm8k", seq_len=96, batch_rows=8),
        "mesh": mesh or MeshSection(),
        "optim": OptimSection(learning_rate=2e-3, weight_decay=0.1),
        "schedule": ScheduleSection(max_steps=20, warmup_steps=3),
        "precision": PrecisionSection(compute="float32"),
        "save": SaveSection(every_steps=0),
        "log": LogSection(progress=False, tensorboard=False),
    }
    return Recipe(name="small", output_dir=str(output_dir), **{**sections, **top})
