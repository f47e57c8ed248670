"""Remat policies: what the backward pass finds ready of each layer, and in which memory that waits for it.

The names are those of marked activations (`tptrain.models.marks`), and LAYER_INPUT for what a turn of the
scan over layers is given, which every policy keeps.
"""

from __future__ import annotations

from tptrain.config.schema import Recipe
from tptrain.topology import Topology

LAYER_INPUT = "layer_input"

_ATTENTION = frozenset({"attended", "logsumexp"})
# With the products of experts also which experts were chosen: rows stand in the order of the choices, and a
# near-tie that is computed again may fall the other way.
_EXPERTS = frozenset({"expert_choices", "expert_gate", "expert_up"})
_PRODUCTS = _ATTENTION | {"query", "key", "value", "gate", "up", "adapter"} | _EXPERTS

# Policy -> the marked activations that are kept instead of computed again. Where attention's results are
# kept, its forward kernel does not run in the backward pass; the softmax of plain attention is made of its
# scores again under every policy. What leaves attention through its output projection is computed again from
# the attended values under "dots": one small product, for a tensor of the size of the layer's input.
KEPT: dict[str, frozenset[str]] = {
    "none": _PRODUCTS | {"scores", "attention_input", "after_attention", "mlp_input", "mlp_hidden"},
    "dots": _PRODUCTS,
    "attention": _ATTENTION,
    "full": frozenset(),
    "offload_attention": _ATTENTION,
    "offload": frozenset(),
}

# Policy -> what of that waits in the host's memory.
OFFLOADED: dict[str, frozenset[str]] = {
    "offload_attention": _ATTENTION | {LAYER_INPUT},
    "offload": frozenset({LAYER_INPUT}),
}


def offloaded(policy: str, topology: Topology) -> frozenset[str]:
    """What a run on these devices keeps in the host's memory: nothing on CPU devices, which share it."""
    return OFFLOADED.get(policy, frozenset()) if topology.chip.platform == "tpu" else frozenset()


def offload_notices(recipe: Recipe, topology: Topology) -> tuple[str, ...]:
    """What a policy that offloads does where nothing can be offloaded."""
    policy = recipe.remat.policy
    if policy not in OFFLOADED or offloaded(policy, topology):
        return ()
    return (
        f"remat.policy={policy} offloads nothing on topology={topology.name}: the memory of virtual CPU"
        " devices is the host's. Results are the same.",
    )
