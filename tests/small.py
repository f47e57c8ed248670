"""Small Llamas of which no two sizes are equal, rows of tokens for them, and plans that train them.

The weights are wide (standard deviation 0.1) so that the logits have a standard deviation of at least 1: with
a fresh model's 0.02, RoPE scaling or a wrong mask would hide in the rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from tptrain.backends.base import Backend, HostShards, Tensors
from tptrain.backends.shards import host_shards
from tptrain.config import (
    DataSection,
    KernelsSection,
    LoraSection,
    LossSection,
    MeshSection,
    ModelSection,
    OptimSection,
    Plan,
    PrecisionSection,
    Recipe,
    RematSection,
    ScheduleSection,
)
from tptrain.config.planning import plan_recipe
from tptrain.config.state_parts import PARAMS
from tptrain.family import ParamRow
from tptrain.mesh import shard_slices
from tptrain.models.decoder import Decoder
from tptrain.train.schedule import step_scalars

Arrays = dict[str, np.ndarray]

WEIGHT_STD = 0.1
VOCAB, ROWS, TOKENS = 1031, 8, 32
# A test takes the first ten of twenty planned steps, so that the learning rate is never 0.
STEPS, PLANNED_STEPS = 10, 20

# 24 heads and 8 kv heads, so that tensor=8 divides them; an epsilon that a layer's output depends on.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 120,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 10,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    # With head_dim 10 the wavelengths are 6, 40, 250, ...: one kept, one blended, three divided.
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def small_config(rope: str = "default", **changes: Any) -> dict[str, Any]:
    """CONFIG with one of ROPES and any other field changed."""
    return {**CONFIG, "rope_parameters": dict(ROPES[rope]), **changes}


LLAMA3 = small_config("llama3")
LLAMA3_TIED = small_config("llama3", tie_word_embeddings=True)


def reference_model(config: Mapping[str, Any]) -> Any:
    """transformers' model of a config, in float32 with eager attention and every tensor random."""
    made = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:  # not as they begin, which would hide a norm whose scale is forgotten
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(WEIGHT_STD * noise)
    return model


@cache
def reference(tied: bool = False) -> Any:
    """The reference model of LLAMA3 or LLAMA3_TIED."""
    return reference_model(LLAMA3_TIED if tied else LLAMA3)


def weights_of(model: Any) -> Tensors:
    """Name -> tensor of every parameter of a reference model; a tied one once.

    transformers keeps gate and up of all experts in one tensor [E, 2 F, D].
    """
    weights: Tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            weights[f"{prefix}gate_proj.weight"], weights[f"{prefix}up_proj.weight"] = tensor.chunk(2, dim=1)
        elif name.endswith("experts.down_proj"):
            weights[f"{name}.weight"] = tensor
        else:
            weights[name] = tensor
    return weights


class DictSource:
    """A TensorSource over whole tensors. `reads` lists every (row name, slices) asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = dict(tensors)
        self.reads: list[tuple[str, tuple[slice, ...]]] = []

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        self.reads.append((row.name, index))
        return self.tensors[row.name][index]


@dataclass(frozen=True)
class Rows:
    """Rows of tokens as the decoder takes them: three int32 arrays [B, T]. Segment 0 is padding."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray

    @property
    def real(self) -> np.ndarray:
        return self.segment_ids > 0

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        arrays = (self.tokens, self.positions, self.segment_ids)
        return tuple(torch.from_numpy(array) for array in arrays)  # type: ignore[return-value]


def _rows(segments: list[list[int]], length: int, seed: int, vocab: int) -> Rows:
    """One row per list: lengths of its segments in order, negative for padding, zeros to the end."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (len(segments), length), dtype=np.int32)
    positions, ids = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, lengths in enumerate(segments):
        at, number = 0, 0
        for size in lengths:
            if size > 0:
                number += 1
                positions[row, at : at + size] = np.arange(size)
                ids[row, at : at + size] = number
            at += abs(size)
        assert at <= length
    return Rows(tokens, positions, ids)


def padded_rows(length: int = 48, seed: int = 1, vocab: int = VOCAB) -> Rows:
    """A full row, two padded on the right, one padded on the left."""
    return _rows([[length], [length - 17], [5], [-11, length - 11]], length, seed, vocab)


def packed_rows(length: int = TOKENS, seed: int = 2, vocab: int = VOCAB) -> Rows:
    """ROWS rows of several segments each, most with padding at the end; a full one and an empty one too."""
    layout = [[9, 13, 7], [length], [length - 10, 10], [1, 2, 3, 4], [20, 5], [], [3, length - 3], [15]]
    assert len(layout) == ROWS
    return _rows(layout, length, seed, vocab)


def reference_logits(model: Any, rows: Rows) -> torch.Tensor:
    """transformers' logits [B, T, V] under an explicit mask: same segment, no later token."""
    tokens, positions, segments = (tensor.long() for tensor in rows.tensors())
    length = tokens.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = allowed & (segments[:, :, None] == segments[:, None, :])
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask).logits
    spread = logits[torch.from_numpy(rows.real)].std().item()
    assert spread >= 1, f"logits have a standard deviation of {spread}: too small to show a fault"
    return logits


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max|ours - theirs| / max|theirs|."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def small_plan(
    fsdp: int = 1,
    tensor: int = 1,
    data: int = 1,
    *,
    backend: str = "xla",
    topology: str = "cpu-8",
    config: Mapping[str, Any] = LLAMA3,
    remat: str = "none",
    accumulation: int = 1,
    optim: Mapping[str, Any] | None = None,
    format: str = "float32",
    trainable: Sequence[str] = ("*",),
    lora: Mapping[str, Any] | None = None,
    chunk_tokens: int = 0,
    length: int = TOKENS,
    attention: str = "auto",
    experts: str = "auto",
    expert: int = 1,
) -> Plan:
    """The plan of a small run: ROWS rows of `length` tokens per micro-batch."""
    settings: dict[str, Any] = {"learning_rate": 2e-3, "weight_decay": 0.1, **(optim or {})}
    recipe = Recipe(
        name="small",
        topology="cpu-1" if backend == "torch" else topology,
        backend=backend,  # type: ignore[arg-type]
        model=ModelSection(config=dict(config), tokenizer="train", trainable=tuple(trainable)),
        lora=LoraSection(**(lora or {})),
        data=DataSection(path="train.jsonl", seq_len=length, batch_rows=ROWS * accumulation),
        mesh=MeshSection(data=data, fsdp=fsdp, tensor=tensor, expert=expert),
        optim=OptimSection(accumulation=accumulation, **settings),
        schedule=ScheduleSection(max_steps=PLANNED_STEPS, warmup_steps=2),
        precision=PrecisionSection(compute=format, master=format),  # type: ignore[arg-type]
        remat=RematSection(policy=remat),  # type: ignore[arg-type]
        loss=LossSection(chunk_tokens=chunk_tokens),
        kernels=KernelsSection(attention=attention, experts=experts),  # type: ignore[arg-type]
    )
    return plan_recipe(recipe, environ={})


def torch_plan(**changes: Any) -> Plan:
    """The same run on the torch backend."""
    return small_plan(backend="torch", **changes)


def train_batch(step: int, accumulation: int = 1, length: int = TOKENS) -> Arrays:
    """The batch of a step: packed rows, of whose targets about two thirds count, unevenly over rows."""
    parts = [packed_rows(length, 1000 * step + micro) for micro in range(accumulation)]
    tokens = np.stack([part.tokens for part in parts])
    segments = np.stack([part.segment_ids for part in parts])
    counts = np.random.default_rng(step).random(tokens.shape) < np.linspace(0.3, 1.0, ROWS)[:, None]
    same = np.zeros_like(counts)
    same[..., :-1] = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=-1),
        "weights": (counts & same).astype(np.float32),
        "positions": np.stack([part.positions for part in parts]),
        "segment_ids": segments,
    }


def plain_loss_and_gradients(
    decoder: Decoder, modules: Tensors, working: Tensors, inputs: Tensors
) -> tuple[torch.Tensor, Tensors]:
    """What `loss_and_gradients` computes, from all logits at once and by autograd.

    Loss and gradients by buffer name; the padding of the vocabulary is cut off before the softmax.
    """
    total = inputs["weights"].sum().clamp(min=1.0)
    losses = []
    for micro in range(inputs["tokens"].shape[0]):
        tokens, positions, segments, targets, weights = (
            inputs[name][micro] for name in ("tokens", "positions", "segment_ids", "targets", "weights")
        )
        logits = functional_call(decoder, modules, (tokens, positions, segments))
        logits = logits[..., : decoder.facts.vocab_size].flatten(0, 1)
        likelihood = torch.nn.functional.cross_entropy(logits, targets.flatten().long(), reduction="none")
        losses.append((likelihood * weights.flatten()).sum() / total)
    loss = torch.stack(losses).sum()
    gradients = torch.autograd.grad(loss, list(working.values()))
    return loss.detach(), dict(zip(working, gradients, strict=True))


def step_inputs(backend: Backend, plan: Plan, constants: Tensors, step: int) -> Tensors:
    """All inputs of the train step number `step`, on the backend's devices. Two batches take turns."""
    recipe = plan.recipe
    scalars = step_scalars(step, PLANNED_STEPS, recipe.schedule, recipe.optim)
    batch = train_batch(step % 2, recipe.optim.accumulation, recipe.data.seq_len)
    return {**backend.put_batch(batch), **backend.put_scalars(scalars), **constants}


def whole(held: HostShards, axis_sizes: Mapping[str, int]) -> torch.Tensor:
    """One tensor from its shards; replicas must be equal, and every element must be held."""
    slices = shard_slices(held.shape, held.spec, axis_sizes)
    first = next(iter(held.shards.values()))
    full = torch.empty(held.shape, dtype=first.dtype)
    written = torch.zeros(held.shape, dtype=torch.bool)
    for position, piece in held.shards.items():
        here = slices[position]
        assert not written[here].any() or torch.equal(full[here], piece), f"replicas differ at {here}"
        full[here], written[here] = piece, True
    assert written.all()
    return full


def whole_rows(backend: Backend, plan: Plan, buffers: Tensors, part: str = PARAMS) -> Tensors:
    """Buffers of a part of the state as whole tensors in memory size, by row name."""
    held = host_shards(backend, buffers, part)
    return {name: whole(shards, plan.mesh.axis_sizes) for name, shards in held.items()}
