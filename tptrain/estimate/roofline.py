"""How fast a step could be if nothing but arithmetic, memory and links took time.

A roofline: peak numbers from the data sheets (`tptrain.topology`), so no step is faster than `fastest`, and
real ones are slower. FLOPs count a multiply-add as two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.estimate.activations import KEPT
from tptrain.estimate.collectives import Collective, Network
from tptrain.estimate.memory import memory
from tptrain.estimate.network import AxisLinks
from tptrain.estimate.workload import Workload
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
}
# A forward matrix product, and the two of its backward pass.
_PASSES = 3


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
    ici:      the busiest mesh axis. dcn: everything between slices; 0 for one slice.
    fastest:  when what can go on at the same time does; slowest: when nothing does.
    mfu:      model FLOPs at peak over `fastest`: an upper bound.
    """

    flops: Flops
    compute_seconds: float
    update_seconds: float
    ici_seconds: float
    dcn_seconds: float
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

    The embedding is a look-up and has none, as long as it is not the head as well. Recomputed: 2 x parameters
    x tokens and 4 x N x H a pair for the matrix products of a layer whose output the remat policy drops.
    """
    tokens = work.rows * work.tokens * work.micro_batches
    kept, facts = KEPT[work.remat], work.facts
    products = [row for row in work.layer_rows if len(row.size) == 2]
    again = sum(row.num_elements for row in products if _MAKES.get(_matrix(row.name), "x") not in {*kept, "x"})
    matrices = sum(row.num_elements for row in products) + work.head.num_elements
    pairs = sum(attended_pairs(work.tokens, kind.window) for kind in facts.layer_period)
    pairs *= facts.num_hidden_layers // work.period * work.rows * work.micro_batches
    forward = 4 * facts.num_attention_heads * facts.head_dim * pairs
    model = 2 * _PASSES * matrices * tokens + _PASSES * forward
    return Flops(model, 2 * again * tokens + (0 if "attended" in kept else forward))


def _matrix(name: str) -> str:
    """`q_proj` of `model.layers.3.self_attn.q_proj.weight`."""
    return name.split(".")[-2]


def seconds_of(
    collective: Collective, links: dict[str, AxisLinks], topology: Topology
) -> float | None:
    """Received bytes over the speed of what they come through; None where that has no published number."""
    if collective.network == "DCN":
        speed = topology.chip.dcn_bytes_per_second
    else:
        speed = links[collective.axis].bytes_per_second
    return collective.received_bytes / speed if speed else None


def roofline(
    work: Workload, topology: Topology, links: dict[str, AxisLinks], moved: Sequence[Collective]
) -> Roofline | None:
    """The roofline of a step; None for a chip without published numbers.

    Between slices a chip without a published number counts as infinitely fast: the bound stays a bound.
    """
    chip = topology.chip
    if not chip.peak_bf16_flops_per_second or not chip.hbm_bytes_per_second:
        return None
    flops = step_flops(work)
    peak = chip.peak_bf16_flops_per_second * work.num_devices
    compute = (flops.model + flops.recomputed) / peak
    update = _update_bytes(work) / chip.hbm_bytes_per_second
    by_axis: dict[tuple[Network, str], float] = {}
    for each in moved:
        key = (each.network, each.axis if each.network == "ICI" else "all")
        by_axis[key] = by_axis.get(key, 0.0) + (seconds_of(each, links, topology) or 0.0)
    ici = max((s for (network, _), s in by_axis.items() if network == "ICI"), default=0.0)
    dcn = max((s for (network, _), s in by_axis.items() if network == "DCN"), default=0.0)
    fastest = max(compute, ici, dcn) + update
    return Roofline(
        flops=flops,
        compute_seconds=compute,
        update_seconds=update,
        ici_seconds=ici,
        dcn_seconds=dcn,
        fastest_seconds=fastest,
        slowest_seconds=compute + sum(by_axis.values()) + update,
        tokens_per_second_per_chip=work.rows * work.tokens * work.micro_batches / work.num_devices / fastest,
        mfu=flops.model / peak / fastest,
    )


def _update_bytes(work: Workload) -> int:
    """Read and written: weights and moments, and read: gradients."""
    state = memory(work).arguments
    trained = sum(work.local_elements(row) for row in work.table if row.trainable)
    width = work.compute_bytes if work.micro_batches == 1 else DTYPE_BYTES["float32"]
    return 2 * (state["parameters"] + state["optimizer state"]) + trained * width
