"""How fast a step could be if nothing but arithmetic, memory and links took time.

A roofline: peak numbers from the data sheets (`tptrain.topology`), so no step is faster than `fastest`, and
real ones are slower. FLOPs count a multiply-add as two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tptrain.config.remat import KEPT
from tptrain.estimate.activations import offloaded_bytes
from tptrain.estimate.collectives import Collective
from tptrain.estimate.memory import memory
from tptrain.estimate.network import AxisLinks
from tptrain.estimate.workload import Workload
from tptrain.family import ParamRow
from tptrain.family.lora import module_of
from tptrain.family.table import DTYPE_BYTES
from tptrain.topology import Topology

# Matrix of a layer -> the activation that it computes: what is not kept is computed again. Nothing needs the
# output of the last one.
_MAKES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "after_attention",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate": "router_logits",  # which no policy keeps
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step over all chips.

    model: what the model asks for; MFU counts these. recomputed: what remat adds; what a kernel computes
    again inside its own backward pass is not in it.
    """

    model: float
    recomputed: float


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step, each thing by itself at its peak.

    compute:  all FLOPs at the peak of bfloat16. update: reading and writing the state in HBM.
    ici:      along the busiest mesh axis. dcn: everything between slices; 0 for one slice.
    host:     offloaded activations, to the host's memory and back; None where its link has no number.
    fastest:  when what can go on at the same time does; slowest: when nothing does.
    mfu:      model FLOPs at peak over `fastest`: an upper bound.
    """

    flops: Flops
    compute_seconds: float
    update_seconds: float
    ici_seconds: float
    busiest_axis: str | None
    dcn_seconds: float
    host_seconds: float | None
    fastest_seconds: float
    slowest_seconds: float
    tokens_per_second_per_chip: float
    mfu: float


def attended_pairs(tokens: int, window: int | None) -> int:
    """Pairs of a token and one it looks at, itself included, in a row of one segment."""
    near = min(window or tokens, tokens)
    return near * (near + 1) // 2 + (tokens - near) * near


def step_flops(work: Workload) -> Flops:
    """6 x parameters in matrix products x tokens, and causal attention: 12 x N x H a pair of tokens.

    Of experts those that a token is given to count. Less for frozen matrices, which have no gradient of their
    own, and for layers that no gradient goes through, because nothing in them or below is trained. The
    embedding is a look-up and has none, as long as it is not the head as well. Recomputed: 2 x parameters x
    tokens and 4 x N x H a pair for the matrix products of a layer whose output the remat policy drops and the
    backward pass asks for.
    """
    tokens, kept = step_tokens(work), KEPT[work.remat]
    forward, back = ([row for row in rows if len(row.size) > 1] for rows in (work.layer_rows, work.back_rows))
    once = sum(work.used_elements(row) for row in [*forward, work.head])
    gone_back = sum(_backward_products(row) * work.used_elements(row) for row in [*back, work.head])
    again = sum(work.used_elements(row) for row in back if _is_recomputed(row, kept))
    attention = _attention_flops(work)
    core_back = attention * work.back_layers / work.facts.num_hidden_layers
    model = 2 * (once + gone_back) * tokens + attention + 2 * core_back
    return Flops(model, 2 * again * tokens + _recomputed_part(work) * core_back)


def _backward_products(row: ParamRow) -> int:
    """Products with a matrix in the backward pass: for the gradient of its input, and for its own."""
    return 2 if row.trainable else 1


def step_tokens(work: Workload) -> int:
    """Tokens of a step over all devices."""
    return work.rows * work.tokens * work.micro_batches


def _is_recomputed(row: ParamRow, kept: frozenset[str]) -> bool:
    """row: a matrix of a layer. An adapter's second one makes a part of what the projection makes."""
    made = "adapter" if row.dims[0] == "rank" else _MAKES.get(module_of(row).rpartition(".")[2])
    return made is not None and made not in kept


def _attention_flops(work: Workload) -> float:
    """Of the forward passes of a step: scores and weighted values of the pairs that the mask lets through."""
    facts = work.facts
    pairs = sum(attended_pairs(work.tokens, kind.window) for kind in facts.layer_kinds)
    rows = work.rows * work.micro_batches
    return 4.0 * facts.num_attention_heads * facts.head_dim * pairs * rows


def _recomputed_part(work: Workload) -> float:
    """How much of the attention core's forward pass the backward pass repeats."""
    kept = KEPT[work.remat]
    if "attended" not in kept:
        return 1.0
    return 0.5 if work.attention == "plain" and "scores" not in kept else 0.0


def seconds_of(collective: Collective, links: Mapping[str, AxisLinks], topology: Topology) -> float | None:
    """Received bytes over the speed of what they come through; None where that has no published number."""
    if collective.network == "DCN":
        speed = topology.chip.dcn_bytes_per_second
    else:
        speed = links[collective.axis].bytes_per_second
    return collective.received_bytes / speed if speed else None


def roofline(
    work: Workload, topology: Topology, links: Mapping[str, AxisLinks], moved: Sequence[Collective]
) -> Roofline | None:
    """The roofline of a step; None for a chip without published numbers.

    A link without a published number counts as infinitely fast: the bound stays a bound.
    """
    chip = topology.chip
    if not chip.peak_bf16_flops_per_second or not chip.hbm_bytes_per_second:
        return None
    flops = step_flops(work)
    peak = chip.peak_bf16_flops_per_second * work.num_devices
    compute = (flops.model + flops.recomputed) / peak
    update = _update_bytes(work) / chip.hbm_bytes_per_second
    ici, dcn = _network_seconds(links, topology, moved)
    busiest = max(ici, key=lambda axis: ici[axis], default=None)
    ici_seconds = max(ici.values(), default=0.0)
    host = _host_seconds(work, topology)
    fastest = max(compute, ici_seconds, dcn, host or 0.0) + update
    return Roofline(
        flops=flops,
        compute_seconds=compute,
        update_seconds=update,
        ici_seconds=ici_seconds,
        busiest_axis=busiest,
        dcn_seconds=dcn,
        host_seconds=host,
        fastest_seconds=fastest,
        slowest_seconds=compute + sum(ici.values()) + dcn + (host or 0.0) + update,
        tokens_per_second_per_chip=step_tokens(work) / work.num_devices / fastest,
        mfu=flops.model / peak / fastest,
    )


def _network_seconds(
    links: Mapping[str, AxisLinks], topology: Topology, moved: Sequence[Collective]
) -> tuple[dict[str, float], float]:
    """Seconds over ICI by mesh axis, whose links are its own, and over DCN, which all axes share."""
    ici: dict[str, float] = {}
    dcn = 0.0
    for each in moved:
        seconds = seconds_of(each, links, topology) or 0.0
        if each.network == "DCN":
            dcn += seconds
        else:
            ici[each.axis] = ici.get(each.axis, 0.0) + seconds
    return ici, dcn


def _host_seconds(work: Workload, topology: Topology) -> float | None:
    """Out in the forward pass and back in the backward pass of each micro-batch, at the speed of one way."""
    moved = 2 * offloaded_bytes(work) * work.micro_batches
    speed = topology.chip.host_link_bytes_per_second
    return 0.0 if not moved else moved / speed if speed else None


def _update_bytes(work: Workload) -> int:
    """Read and written: weights and moments, and read: gradients."""
    moving = [row for row in work.table if row.trainable]
    weights = sum(work.local_elements(row) * DTYPE_BYTES[row.storage_dtype] for row in moving)
    width = work.compute_bytes if work.micro_batches == 1 else DTYPE_BYTES["float32"]
    gradients = sum(work.local_elements(row) for row in moving) * width
    return 2 * (weights + memory(work).arguments["optimizer state"]) + gradients
