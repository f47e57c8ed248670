"""A mixture of experts in the place of a layer's MLP: a router chooses a few of many MLPs for every token.

Shapes: B batch, T tokens, D model, E experts, K experts chosen for a token, F mlp of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

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
    marks: Marks,
) -> torch.Tensor:
    """The core as it is written: every expert computes every token, and most results weigh nothing.

    Shapes do not depend on the choices, at E / K times the products that are needed. For the backward pass
    only what is given here is kept, under every remat policy: each expert's products are made again, so that
    [B, T, F] exists for one expert at a time.
    """
    result: torch.Tensor = _EveryExpert.apply(activation, marks, choices, x, weights, gate, up, down)
    return result


class _EveryExpert(torch.autograd.Function):
    """The sum over all experts; autograd by itself would keep the activations of all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        marks: Marks,
        choices: torch.Tensor,
        x: torch.Tensor,
        weights: torch.Tensor,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(choices, x, weights, *matrices)
        ctx.activation, ctx.marks = activation, marks
        total = torch.zeros_like(x)
        for expert, own in enumerate(zip(*matrices, strict=True)):
            total = total + _one_expert((x, weights, *own), choices == expert, activation, marks)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        choices, x, weights, *matrices = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        found: dict[int, list[torch.Tensor]] = {i: [] for i in wanted}
        for expert, own in enumerate(zip(*matrices, strict=True)):
            leaves = [tensor.detach() for tensor in (x, weights, *own)]
            with torch.enable_grad():
                inputs = [leaves[i].requires_grad_(True) for i in wanted]
                y = _one_expert(leaves, choices == expert, ctx.activation, ctx.marks)
            for i, of_input in zip(wanted, torch.autograd.grad(y, inputs, gradient), strict=True):
                # All experts share x and the weights: their gradients are added up as they come.
                found[i] = [found[i][0] + of_input] if i < 2 and found[i] else [*found[i], of_input]
        gradients = {i: each[0] if i < 2 else torch.stack(each) for i, each in found.items()}
        return None, None, None, *(gradients.get(i) for i in range(2 + len(matrices)))


def _one_expert(
    given: Sequence[torch.Tensor], is_chosen: torch.Tensor, activation: Activation, marks: Marks
) -> torch.Tensor:
    """What one expert adds to the result [B, T, D].

    given: x [B, T, D], weights [B, T, K], gate and up [F, D], down [D, F]. is_chosen: [B, T, K].
    """
    x, weights, gate, up, down = given
    weight = torch.where(is_chosen, weights, 0).sum(-1, keepdim=True)
    # Names of their own: kept by the names of a plain MLP, they would be kept once for every expert.
    opened = marks(F.linear(x, gate), "one_expert_gate", "act_batch", "act_tokens", "act_mlp")
    values = marks(F.linear(x, up), "one_expert_up", "act_batch", "act_tokens", "act_mlp")
    hidden = activation(opened) * values
    hidden = marks(hidden, "one_expert_hidden", "act_batch", "act_tokens", "act_mlp")
    return weight * F.linear(hidden, down)


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
        # What is kept of a layer's products is in the order of these, so they are kept with them.
        choices = self.marks(
            choices.to(torch.int32), "expert_choices", "act_batch", "act_tokens", "act_choices"
        )
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
