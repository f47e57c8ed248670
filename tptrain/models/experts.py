"""A mixture of experts in the place of a layer's MLP: a router chooses a few of many MLPs for every token.

Shapes: B batch, T tokens, D model, E experts, K experts chosen for a token, F mlp of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from tptrain.family.facts import ExpertFacts
from tptrain.models.marks import Marks

Activation = Callable[[torch.Tensor], torch.Tensor]


class ExpertsCore(Protocol):
    """What the chosen experts make of their tokens; all layers share it."""

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        choices: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        activation: Activation,
    ) -> torch.Tensor:
        """x [B, T, D], weights and choices [B, T, K], gate and up [E, F, D], down [E, D, F] -> [B, T, D].

        The sum over a token's choices of weight x down(activation(gate(x)) * up(x)).
        """
        ...


def every_expert(
    x: torch.Tensor,
    weights: torch.Tensor,
    choices: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """The core as it is written: every expert computes every token, and most results weigh nothing.

    Shapes do not depend on the choices, at E / K times the products that are needed.
    """
    total = torch.zeros_like(x)
    for expert in range(gate.shape[0]):
        weight = torch.where(choices == expert, weights, 0).sum(-1, keepdim=True)
        hidden = activation(F.linear(x, gate[expert])) * F.linear(x, up[expert])
        total = total + weight * F.linear(hidden, down[expert])
    return total


class ExpertMatrix(nn.Module):
    """One matrix of every expert: [E, out, in]."""

    def __init__(self, experts: int, outputs: int, inputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))


class Experts(nn.Module):
    """The matrices of all experts of a layer."""

    def __init__(self, d: int, facts: ExpertFacts):
        super().__init__()
        count, f = facts.num_experts, facts.intermediate_size
        self.gate_proj = ExpertMatrix(count, f, d)
        self.up_proj = ExpertMatrix(count, f, d)
        self.down_proj = ExpertMatrix(count, d, f)


class MixtureOfExperts(nn.Module):
    """The router and its experts, as in Mixtral (arXiv:2401.04088)."""

    def __init__(self, d: int, facts: ExpertFacts, activation: Activation, marks: Marks):
        super().__init__()
        self.gate = nn.Linear(d, facts.num_experts, bias=False)
        self.experts = Experts(d, facts)
        self.facts, self.activation, self.marks = facts, activation, marks

    def forward(
        self, x: torch.Tensor, core: ExpertsCore, counted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] -> [B, T, D], and the router's sums [2, E] over the `counted` tokens [B, T], if given.

        The sums are how often each expert was chosen, which has no gradient, and its probabilities; float32
        or wider.
        """
        logits = self.gate(x)
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        choices = probabilities.detach().topk(self.facts.num_experts_per_tok, dim=-1).indices
        chosen = choices[..., None] == torch.arange(self.facts.num_experts, device=x.device)
        # Picked by comparison: a gather's gradient is a scatter, which devices could not do each by itself.
        weights = torch.where(chosen, probabilities[..., None, :], 0).sum(-1)
        if self.facts.normalises_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        gate, up, down = self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj
        y = core(x, weights.to(x.dtype), choices, gate.weight, up.weight, down.weight, self.activation)
        if counted is None:
            return y, None
        share = counted[..., None].to(probabilities.dtype)
        chosen_often = (chosen.any(-2) * share).flatten(0, 1).sum(0)
        return y, torch.stack([chosen_often, (probabilities * share).flatten(0, 1).sum(0)])


def router_loss(sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The loss that grows as tokens crowd at few experts: at least K, reached when all get as many.

    sums:   [2, E] over the counted tokens of all layers with experts (`MixtureOfExperts`).
    tokens: a scalar, how many these were, each once per layer.
    E x the sum over experts of (choices per token) x (mean probability): arXiv:2101.03961, for K choices.
    """
    chosen, probability = sums / tokens.clamp(min=1)
    return sums.shape[-1] * (chosen * probability).sum()
