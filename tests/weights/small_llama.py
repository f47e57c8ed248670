"""A Llama in which no two sizes are equal, as transformers builds and saves it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tptrain.family import ParamRow, facts_from_config, parameter_table

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def small_config(tied: bool = False, rope: Mapping[str, Any] | None = None) -> LlamaConfig:
    """Vocab 131, D 48, F 80, 3 layers, 6 heads, 2 kv heads, head dim 10 (not 48 / 6)."""
    return LlamaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        rope_parameters=dict(rope or {"rope_type": "default", "rope_theta": 20000.0}),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def small_model(tied: bool = False, rope: Mapping[str, Any] | None = None) -> Any:
    """A LlamaForCausalLM whose every tensor is random and whose logits have a standard deviation above 1."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(small_config(tied, rope))
    with torch.no_grad():  # norms start as ones, which would hide a mix-up
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
    return model


def saved_model(
    folder: Path,
    tied: bool = False,
    rope: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
) -> Any:
    """Save a small model to `folder` and return it in the dtype it was saved in."""
    model = small_model(tied, rope).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def saved_table(folder: Path) -> tuple[ParamRow, ...]:
    return parameter_table(facts_from_config(read_config(folder)))


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, as copies, since load_file maps the file."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.clone() for path in files for name, tensor in load_file(path).items()}


def rewrite(folder: Path, change: Mapping[str, torch.Tensor | None]) -> None:
    """Replace (or, with None, remove) tensors of a single-file checkpoint."""
    tensors = {**saved_tensors(folder), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def small_tokenizer() -> Any:
    """A byte-level BPE with <s>=0, </s>=1, <pad>=2, a turn-end token and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=131, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False
    )
    bpe.train_from_iterator(["hello world, 3 + 4 = 7; the quick brown fox"] * 9, trainer)
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<turn_end>"],
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<turn_end>{% endfor %}"
    return tokenizer


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
