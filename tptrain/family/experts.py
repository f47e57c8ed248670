"""What the configs of mixtures of experts share."""

from __future__ import annotations

from tptrain.family.facts import ExpertFacts
from tptrain.family.hf_config import ConfigReader


def read_experts(
    reader: ConfigReader, *, count: int, chosen: int, intermediate_size: int, normalises_weights: bool
) -> ExpertFacts:
    """Facts of experts. chosen: how many a token is given to where the config does not say.

    As in transformers, the router's loss counts where `output_router_logits` is true.
    """
    chosen = reader.size("num_experts_per_tok", chosen)
    if not reader.is_bad("num_experts_per_tok", "num_experts", "num_local_experts") and chosen > count:
        rule, other = "must be at most the number of experts", f"experts: {count}"
        reader.report("num_experts_per_tok", chosen, rule, other, f"1 to {count}")
    coef = reader.number("router_aux_loss_coef", 0.001)
    has_loss = reader.flag("output_router_logits", False)
    return ExpertFacts(count, chosen, intermediate_size, normalises_weights, coef if has_loss else 0.0)
