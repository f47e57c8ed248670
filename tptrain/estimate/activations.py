"""The activations of a decoder layer by name and dims, and the bytes of those that a remat policy keeps.

Shapes: B batch, T tokens, S keys, D model, N heads, K kv heads, G = N / K, H head dim, F mlp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tptrain.config.remat import KEPT, LAYER_INPUT
from tptrain.estimate.workload import Workload
from tptrain.family import ModelFacts
from tptrain.family.table import DTYPE_BYTES
from tptrain.mesh.rules import split_count

_TOKENS = ("act_batch", "act_tokens")
_STREAM = (*_TOKENS, "act_embed")
_HEADS = (*_TOKENS, "act_heads", "act_head_dim")
_KV_HEADS = (*_TOKENS, "act_kv_heads", "act_head_dim")
_SCORES = ("act_batch", "act_kv_heads", "act_group", "act_tokens", "act_keys")
_MLP = (*_TOKENS, "act_mlp")
_RANK = (*_TOKENS, "act_rank")
_EXPERT_MLP = ("act_expert_rows", "act_expert_mlp")


@dataclass(frozen=True)
class Activation:
    """One activation of a layer.

    block: which half of the layer computes it.
    core:  the one it belongs to, of attention ("plain", "splash") or of the MLP: experts with rows sorted by
           them ("grouped"), or an MLP and experts without ("ungrouped"); or "adapters". None: all.
    dtype: its format; None: the compute format.
    """

    name: str
    dims: tuple[str, ...]
    block: str
    core: str | None = None
    dtype: str | None = None


# In the order of the forward pass (models/decoder.py). Those that it marks have the mark's name and dims; the
# others are operands of matrix products, which the backward pass needs as well.
LAYER = (
    Activation("attention_input", _STREAM, "attention"),
    Activation("query", _HEADS, "attention"),
    Activation("key", _KV_HEADS, "attention"),
    Activation("value", _KV_HEADS, "attention"),
    Activation("scores", _SCORES, "attention", "plain"),
    Activation("logsumexp", ("act_batch", "act_heads", "act_tokens"), "attention", "splash", "float32"),
    Activation("attended", _HEADS, "attention"),
    Activation("after_attention", _STREAM, "attention"),
    # Those of all adapters of a layer, its MLP's included: they are small.
    Activation("adapter", _RANK, "attention", "adapters"),
    Activation("mlp_input", _STREAM, "mlp"),
    Activation("gate", _MLP, "mlp", "ungrouped"),
    Activation("up", _MLP, "mlp", "ungrouped"),
    Activation("mlp_hidden", _MLP, "mlp", "ungrouped"),
    Activation("expert_choices", (*_TOKENS, "act_choices"), "mlp", "grouped", "int32"),
    Activation("expert_rows", ("act_expert_rows", "act_embed"), "mlp", "grouped"),
    Activation("expert_gate", _EXPERT_MLP, "mlp", "grouped"),
    Activation("expert_up", _EXPERT_MLP, "mlp", "grouped"),
    Activation("expert_hidden", _EXPERT_MLP, "mlp", "grouped"),
)


def layer_activations(work: Workload) -> list[Activation]:
    """The activations that a layer has with this attention core and this core of its MLP.

    Where some layers have experts and some have none, all are counted as if they had.
    """
    cores = (None, work.attention, "grouped" if work.experts == "grouped" else "ungrouped")
    adapters = ("adapters",) if work.layer_rank else ()
    return [activation for activation in LAYER if activation.core in (*cores, *adapters)]


_WIDTHS = {**DTYPE_BYTES, "int32": 4}

# A TPU's memory holds the last dim of an array in tiles of so many numbers.
_LANES = 128


def act_sizes(work: Workload) -> dict[str, int]:
    """Dim of an activation -> its size over all devices, in one micro-batch.

    A kernel reads and writes heads with their own dim last, which memory then pads to whole tiles: with a
    head dim of 64 half of it is padding. Other programs let the compiler choose another dim.
    """
    facts, head = work.facts, work.head
    experts = facts.experts
    chosen = experts.num_experts_per_tok if experts else 0
    lanes = _LANES if work.attention == "splash" else 1
    return {
        "act_batch": work.rows,
        "act_tokens": work.tokens,
        "act_keys": work.tokens,
        "act_embed": facts.hidden_size,
        "act_heads": facts.num_attention_heads,
        "act_kv_heads": facts.num_key_value_heads,
        "act_group": facts.num_attention_heads // facts.num_key_value_heads,
        "act_head_dim": -(-facts.head_dim // lanes) * lanes,
        "act_mlp": mlp_size(facts),
        "act_choices": chosen,
        # Of all tokens that a device collects, not of its own experts alone: shapes do not know the routing.
        "act_expert_rows": work.rows * work.tokens * chosen * split_count(work.expert_axes, work.axis_sizes),
        "act_expert_mlp": experts.intermediate_size if experts else 0,
        "act_rank": work.layer_rank,
        "act_vocab": head.padded_size[head.dims.index("vocab")],
    }


def mlp_size(facts: ModelFacts) -> int:
    """Width of the MLP's activations for one token: of the widest kind of layer, with all its experts."""
    widths = [facts.intermediate_size] if any(not kind.has_experts for kind in facts.layer_kinds) else []
    if facts.experts is not None:
        widths.append(facts.experts.num_experts_per_tok * facts.experts.intermediate_size)
    return max(widths)


def device_elements(dims: tuple[str, ...], work: Workload) -> int:
    """Numbers of an activation with these dims on one device."""
    sizes = act_sizes(work)
    pieces = (split_count(work.rules.acts[dim] or (), work.axis_sizes) for dim in dims)
    return math.prod(-(-sizes[dim] // count) for dim, count in zip(dims, pieces, strict=True))


def device_bytes(activation: Activation, work: Workload) -> int:
    """Bytes of one layer's activation on one device."""
    width = _WIDTHS[activation.dtype] if activation.dtype else work.compute_bytes
    return device_elements(activation.dims, work) * width


def stream_bytes(work: Workload) -> int:
    """Bytes of the residual stream, [B, T, D], on one device."""
    return device_elements(_STREAM, work) * work.compute_bytes


def logits_bytes(work: Workload) -> int:
    """Bytes on one device of the logits that exist at a time, [tokens, V] in the compute format."""
    return work.logits_tokens * device_elements(("act_vocab",), work) * work.compute_bytes


def shared_bytes(work: Workload) -> int:
    """Bytes of what all layers read and none changes: rotary tables, and the masks of the plain core."""
    tables = 2 * len(work.facts.ropes)
    rotary = tables * device_elements((*_TOKENS, "act_head_dim"), work) * work.compute_bytes
    if work.attention == "splash":
        return rotary
    return rotary + len(work.facts.windows) * device_elements((*_TOKENS, "act_keys"), work)


def kept_bytes(work: Workload) -> int:
    """Bytes that the layers of the backward pass keep for it on a device."""
    return sum(size for name, size in _kept(work) if name not in work.offloaded)


def offloaded_bytes(work: Workload) -> int:
    """Bytes that they keep in the host's memory for one device."""
    return sum(size for name, size in _kept(work) if name in work.offloaded)


def _kept(work: Workload) -> Iterator[tuple[str, int]]:
    """Names and bytes over all layers that keep something: each turn's input, and what the policy names."""
    layers = work.back_layers
    yield LAYER_INPUT, work.back_turns * stream_bytes(work)
    for activation in layer_activations(work):
        if activation.name in KEPT[work.remat]:
            yield activation.name, layers * device_bytes(activation, work)


def in_flight_bytes(work: Workload, bytes_per_score: float) -> int:
    """Bytes that the backward pass of one turn of the scan works with.

    All its activations, kept ones included, because a turn copies its own out of the stack; and the gradients
    of one block's, the larger, because those of the other are not there yet or no longer. Scores exist for
    one layer at a time: `bytes_per_score` is what softmax and gradients take for each.
    """
    values, gradients = 0, {"attention": 0, "mlp": 0}
    for activation in layer_activations(work):
        if activation.name == "scores":
            gradients["attention"] += round(bytes_per_score * device_elements(activation.dims, work))
        else:
            values += device_bytes(activation, work)
            gradients[activation.block] += device_bytes(activation, work)
            if activation.name == "query":
                gradients["attention"] += work.query_gradient_parts * device_bytes(activation, work)
    return work.period * values + max(gradients.values())


def forward_bytes(work: Workload, bytes_per_score: float) -> int:
    """Bytes that the forward pass of a layer works with where no backward pass follows: those of its larger
    block, and the residual stream."""
    blocks = {"attention": 0, "mlp": 0}
    for activation in layer_activations(work):
        if activation.name == "scores":
            blocks["attention"] += round(bytes_per_score * device_elements(activation.dims, work))
        else:
            blocks[activation.block] += device_bytes(activation, work)
    return stream_bytes(work) + max(blocks.values())
