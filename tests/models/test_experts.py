"""The parts of a mixture of experts: its core, its router and the router's loss, each beside an oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests import families, small
from tests.models import test_families as whole
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.family import facts_from_config
from tptrain.family.facts import ExpertFacts
from tptrain.models import decoder as decoder_module
from tptrain.models.experts import MixtureOfExperts, every_expert, router_loss
from tptrain.models.marks import Marks
from tptrain.train.step import loss_and_gradients

B, T, D, E, FF, K = 3, 7, 10, 5, 6, 2
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.7}


def given(experts: int = E, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x, weights, choices, gate, up, down of a core; the choices of a token are different ones."""
    generator = torch.Generator().manual_seed(experts)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(True)

    choices = torch.rand(B, T, experts, generator=generator).topk(K, dim=-1).indices
    matrices = noise(experts, FF, D), noise(experts, FF, D), noise(experts, D, FF)
    return noise(B, T, D), noise(B, T, K), choices, *matrices


def token_by_token(
    x: torch.Tensor, weights: torch.Tensor, choices: torch.Tensor, *matrices: Any
) -> torch.Tensor:
    """The sum as it is defined, only for the experts that were chosen."""
    gate, up, down = matrices
    rows = []
    for token, own, chosen in zip(x.flatten(0, 1), weights.flatten(0, 1), choices.flatten(0, 1), strict=True):
        parts = [
            w * (down[e] @ (F.silu(gate[e] @ token) * (up[e] @ token)))
            for w, e in zip(own, chosen, strict=True)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows).view_as(x)


def core(*tensors: torch.Tensor, marks: Marks | None = None) -> torch.Tensor:
    return every_expert(*tensors, F.silu, marks or Marks())  # type: ignore[arg-type]


def test_the_core_and_its_gradients_equal_the_definition() -> None:
    x, weights, _, *matrices = tensors = given()
    expected, ours = token_by_token(*tensors), core(*tensors)
    assert small.difference(ours.detach(), expected.detach()) <= 1e-12
    inputs, direction = [x, weights, *matrices], torch.randn_like(x)
    theirs = torch.autograd.grad(expected, inputs, direction)
    for mine, other in zip(torch.autograd.grad(ours, inputs, direction), theirs, strict=True):
        assert small.difference(mine, other) <= 1e-12


@pytest.mark.parametrize("trained", [(0,), (1, 3), (2, 3, 4), (0, 4)])
def test_gradients_of_some_of_the_inputs_are_the_same(trained: tuple[int, ...]) -> None:
    """0 to 4: x, weights, gate, up, down; the others are frozen."""
    x, weights, choices, *matrices = given()
    inputs = [x, weights, *matrices]
    expected = torch.autograd.grad(core(x, weights, choices, *matrices).sum(), inputs)
    leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(inputs)]
    core(leaves[0], leaves[1], choices, *leaves[2:]).sum().backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i not in trained)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[i])


@pytest.mark.parametrize("experts", [3, 12])
def test_the_backward_pass_keeps_nothing_but_what_was_given(experts: int) -> None:
    tensors, kept = given(experts), list[int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        core(*tensors)
    assert kept and set(kept) <= {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_activations_of_one_expert_are_marked_in_both_passes() -> None:
    marks, seen = Marks(), list[tuple[str, tuple[int, ...], tuple[str, ...]]]()
    marks.functions.append(lambda x, name, dims: seen.append((name, tuple(x.shape), dims)) or x)
    y = core(*given(), marks=marks)
    names = ("one_expert_gate", "one_expert_up", "one_expert_hidden")
    expected = [(name, (B, T, FF), ("act_batch", "act_tokens", "act_mlp")) for name in names]
    assert seen == expected * E
    y.sum().backward()
    assert seen == expected * 2 * E


def mixture(facts: ExpertFacts, dtype: torch.dtype = torch.float32) -> tuple[MixtureOfExperts, Any]:
    """A mixture with random weights, and a core that hands out what the router gave it."""
    module = MixtureOfExperts(D, facts, F.silu, Marks()).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    handed: dict[str, torch.Tensor] = {}

    def listen(x: torch.Tensor, weights: torch.Tensor, choices: torch.Tensor, *others: Any) -> torch.Tensor:
        handed.update(weights=weights, choices=choices)
        return x

    return module, (listen, handed)


@pytest.mark.parametrize("normalises", [True, False])
def test_the_router_in_bfloat16_takes_its_softmax_in_float32(normalises: bool) -> None:
    module, (listen, handed) = mixture(ExpertFacts(E, K, FF, normalises), torch.bfloat16)
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2)).bfloat16()
    y, sums = module(x, listen, torch.ones(B, T))
    assert y is x and sums.dtype == torch.float32
    probabilities = F.linear(x, module.gate.weight).float().softmax(-1)
    top, choices = probabilities.topk(K)
    top = top / top.sum(-1, keepdim=True) if normalises else top
    # Experts whose logits are one number may stand in either order.
    assert torch.equal(probabilities.gather(-1, handed["choices"]), probabilities.gather(-1, choices))
    assert torch.equal(handed["weights"], top.bfloat16())
    torch.testing.assert_close(sums[1], probabilities.sum((0, 1)))
    assert sums[0].sum() == B * T * K


# The router's loss.


def layers_of_logits() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Router logits [B, T, E] of three unlike layers, and which tokens are real."""
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randn(B, T, E, generator=generator) * scale for scale in (0.5, 1.0, 3.0)]
    return logits, torch.rand(B, T, generator=generator) > 0.4


def sums_of(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """What a mixture tells of these router logits: it is given them through an identity for a router."""
    module = MixtureOfExperts(E, ExpertFacts(E, K, FF, True), F.silu, Marks())
    module.gate.weight.data = torch.eye(E)
    _, sums = module(logits, lambda x, *others: x, real.float())
    return sums.detach()


def test_the_routers_loss_equals_transformers() -> None:
    logits, real = layers_of_logits()
    flat = tuple(each.flatten(0, 1) for each in logits)
    expected = load_balancing_loss_func(flat, E, K, real)
    total = torch.stack([sums_of(each, real) for each in logits]).sum(0)
    assert router_loss(total, real.sum() * len(logits)).item() == pytest.approx(expected.item(), rel=1e-6)
    # What it is not: of all tokens, and the mean of the layers' own.
    everywhere = load_balancing_loss_func(flat, E, K)
    mean = torch.stack([router_loss(sums_of(each, real), real.sum()) for each in logits]).mean()
    for other in (everywhere, mean):
        assert abs(other.item() / expected.item() - 1) > 1e-3


def test_the_routers_loss_of_even_choices_is_as_small_as_it_gets() -> None:
    tokens = torch.tensor(20.0)
    even = torch.stack([torch.full((E,), 20 * K / E), torch.full((E,), 20 / E)])
    assert router_loss(even, tokens).item() == pytest.approx(K)
    assert router_loss(torch.zeros(2, E), torch.tensor(0.0)) == 0, "no token, no loss"


# Whole models.

# The cases of tests.families the other way: the loss of a router with dense layers between, and without it.
SWITCHED: dict[str, dict[str, Any]] = {
    "mixtral": {**families.CONFIGS["mixtral"], "output_router_logits": False},
    "qwen3_moe": {**families.CONFIGS["qwen3_moe"], **ROUTER},
}


@pytest.mark.parametrize("name", SWITCHED)
def test_training_losses_equal_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.CONFIGS, name, SWITCHED[name])
    families.model_of.cache_clear()
    try:
        whole.test_training_losses_equal_those_of_transformers(name)
    finally:
        families.model_of.cache_clear()


def weights_of(name: str) -> Tensors:
    return small.weights_of(families.model_of(name))


def step_of(plan: Any, batch: Tensors) -> tuple[torch.Tensor, Tensors]:
    """Loss and gradients of the switched Qwen3-MoE, which has the weights of the case as it is."""
    model = TorchBackend(plan).decoder()
    working = {n: t.clone().requires_grad_(True) for n, t in weights_of("qwen3_moe").items()}
    loss, _, gradients = loss_and_gradients(model, {**working, **model.constants()}, working, batch)
    return loss, gradients


def batch_of(accumulation: int) -> Tensors:
    return {n: torch.from_numpy(array) for n, array in small.train_batch(1, accumulation).items()}


def test_remat_changes_nothing() -> None:
    plans = [small.torch_plan(config=SWITCHED["qwen3_moe"], remat=remat) for remat in ("none", "full")]
    (loss, gradients), (again, same) = (step_of(plan, batch_of(1)) for plan in plans)
    assert loss == again
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


def test_micro_batches_average_the_routers_losses_by_counted_tokens() -> None:
    plan, batch = small.torch_plan(config=SWITCHED["qwen3_moe"]), batch_of(2)
    parts = [step_of(plan, {n: t[i : i + 1] for n, t in batch.items()}) for i in range(2)]
    counts = batch["weights"].sum((1, 2))
    share = counts / counts.sum()
    loss, gradients = step_of(plan, batch)
    assert loss.item() == pytest.approx(
        sum((s * part).item() for s, (part, _) in zip(share, parts, strict=True))
    )
    name = "model.layers.2.mlp.gate.weight"
    expected = sum(s * g[name] for s, (_, g) in zip(share, parts, strict=True))
    assert small.difference(gradients[name], expected) <= 1e-5


def test_without_a_coefficient_nothing_of_the_routers_loss_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    original = MixtureOfExperts.forward

    def forward(self: MixtureOfExperts, x: Any, core: Any, counted: torch.Tensor | None) -> Any:
        y, sums = original(self, x, core, counted)
        asked.append(counted is not None or sums is not None)
        return y, sums

    monkeypatch.setattr(MixtureOfExperts, "forward", forward)
    monkeypatch.setattr(decoder_module, "router_loss", lambda *given: asked.append(True) or torch.zeros(()))
    for config, wanted in ((families.CONFIGS["qwen3_moe"], [False] * 2), (SWITCHED["qwen3_moe"], [True] * 3)):
        asked.clear()
        step_of(small.torch_plan(config=config), batch_of(1))
        assert asked == wanted


def test_the_routers_loss_reaches_every_router() -> None:
    """The gradient of a router is another one with it, in layers above and below a dense one."""
    plain, switched = (
        step_of(small.torch_plan(config=config), batch_of(1))[1]
        for config in (families.CONFIGS["qwen3_moe"], SWITCHED["qwen3_moe"])
    )
    routers = [name for name in plain if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert all(small.difference(switched[name], plain[name]) > 1e-2 for name in routers)


# Faults that facts cannot state; the others are in test_families.


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_router_that_normalises_by_softmax_after_its_choice_shows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the chosen alone: another model where weights are as they are, the same where they sum to 1."""
    original = MixtureOfExperts.forward

    def forward(self: MixtureOfExperts, x: Any, core: Any, counted: Any) -> Any:
        logits = self.gate(x)

        def other(x: Any, weights: torch.Tensor, choices: torch.Tensor, *others: Any) -> torch.Tensor:
            return core(x, logits.gather(-1, choices).softmax(-1), choices, *others)

        return original(self, x, other, counted)

    monkeypatch.setattr(MixtureOfExperts, "forward", forward)
    gap = whole.gap(name, "packed", whole.facts_of(name), weights_of(name))
    assert gap <= whole.LOGITS if name == "mixtral" else gap >= whole.BROKEN


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj", "down_proj"])
def test_experts_of_one_matrix_in_another_order_show(name: str, matrix: str) -> None:
    ending = f"experts.{matrix}.weight"
    weights = {n: t.roll(1, 0) if n.endswith(ending) else t for n, t in weights_of(name).items()}
    assert whole.gap(name, "padded", whole.facts_of(name), weights) >= whole.BROKEN


def test_experts_in_the_place_of_an_mlp_show() -> None:
    """The dense layer of Qwen3-MoE moved by one."""
    facts = facts_from_config(families.CONFIGS["qwen3_moe"])
    first, dense, last = facts.layer_kinds
    assert not dense.has_experts
    moved = dataclasses.replace(facts, layer_period=(dense, first, last))
    other = {"layers.0.mlp": "layers.1.mlp", "layers.1.mlp": "layers.0.mlp"}
    weights = {}
    for name, tensor in weights_of("qwen3_moe").items():
        place = name.removeprefix("model.")[: len("layers.0.mlp")]
        weights[name.replace(place, other.get(place, place))] = tensor
    assert whole.gap("qwen3_moe", "packed", moved, weights) >= whole.BROKEN
