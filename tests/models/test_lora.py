"""LoRA against PEFT over transformers: logits, gradients and losses, of every family that differs in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call

from tests import adapters, families, small
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config import Plan
from tptrain.models.decoder import Decoder
from tptrain.models.linear import Linear
from tptrain.train.schedule import learning_rate
from tptrain.train.state import fresh_state, split_frozen
from tptrain.train.step import loss_and_gradients, make_train_step

STEPS = 10
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ALL[:4]
DIMS = ("heads", "kv_heads", "mlp")
# Family -> targets in the recipe, and the modules that they mean. Alpha over rank is no power of 2.
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (DIMS, ALL),
    "qwen2": (("kv_heads", "q_proj"), ("q_proj", "k_proj", "v_proj")),  # with biases
    "qwen3": (DIMS, ALL),  # norms between projection and rotation
    "gemma2": (("model.layers.*.mlp.*", "o_proj"), ("o_proj", "gate_proj", "up_proj", "down_proj")),
    "mixtral": (("heads", "kv_heads"), ATTENTION),  # the router's loss goes through frozen experts
}


def lora_plan(name: str) -> Plan:
    lora = {"rank": 3, "alpha": 7.0, "targets": CASES[name][0]}
    return small.torch_plan(config=families.CONFIGS[name], lora=lora, optim={"clip_norm": 1.0})


def base_of(name: str) -> Any:
    return adapters.rounded(small.reference_model(families.CONFIGS[name]))


def modules_of(name: str, plan: Plan, values: dict[str, torch.Tensor]) -> tuple[Decoder, dict[str, Any]]:
    """The decoder and all its tensors in float32."""
    backend = TorchBackend(plan)
    decoder = backend.decoder()
    placed = backend.place(adapters.weights_of(base_of(name), plan, values))
    return decoder, {**{n: t.float() for n, t in placed.items()}, **decoder.constants()}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_pefts(name: str) -> None:
    plan, rows = lora_plan(name), small.packed_rows()
    values = adapters.random_adapters(plan)
    decoder, modules = modules_of(name, plan, values)
    wrapped = adapters.peft_model(base_of(name), plan, values, CASES[name][1])
    real = torch.from_numpy(rows.real)
    with torch.no_grad():
        ours = functional_call(decoder, modules, rows.tensors())[..., : small.VOCAB][real]
        theirs = families.outputs_of(wrapped.base_model.model, rows)[0][real]
        without = families.outputs_of(base_of(name), rows)[0][real]
    assert small.difference(ours, theirs) <= 1e-5
    assert small.difference(without, theirs) > 0.01, "adapters that do nothing would always be equal"


@pytest.mark.parametrize("name", CASES)
def test_adapters_begin_as_nothing(name: str) -> None:
    """With B zero, logits are those of the base bit for bit."""
    plan, rows = lora_plan(name), small.packed_rows()
    decoder, modules = modules_of(name, plan, adapters.random_adapters(plan, begun=False))
    plain = TorchBackend(small.torch_plan(config=families.CONFIGS[name])).decoder()
    weights = {n: t for n, t in modules.items() if ".lora_" not in n}
    with torch.no_grad():
        adapted = functional_call(decoder, modules, rows.tensors())
        assert torch.equal(adapted, functional_call(plain, weights, rows.tensors()))


def their_loss(wrapped: Any, step: int) -> torch.Tensor:
    """The loss of a batch by transformers' model with PEFT's adapters, the router's included."""
    batch = {n: torch.from_numpy(array[0]) for n, array in small.train_batch(step % 2).items()}
    rows = small.Rows(*(batch[n].numpy() for n in ("tokens", "positions", "segment_ids")))
    logits, router_loss = families.outputs_of(wrapped.base_model.model, rows)
    targets, weights = batch["targets"].flatten().long(), batch["weights"].flatten()
    likelihood = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    return (likelihood * weights).sum() / weights.sum() + router_loss


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_pefts(name: str) -> None:
    plan = lora_plan(name)
    values = adapters.random_adapters(plan)
    decoder, modules = modules_of(name, plan, values)
    working = {n: modules[n].requires_grad_(True) for n in values}
    inputs = small.step_inputs(TorchBackend(plan), plan, decoder.constants(), 1)
    loss, _, gradients = loss_and_gradients(decoder, modules, working, inputs)
    wrapped = adapters.peft_model(base_of(name), plan, values, CASES[name][1])
    expected = their_loss(wrapped, 1)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = adapters.adapter_parameters(wrapped)
    assert set(gradients) == set(theirs)
    for row, gradient in gradients.items():
        wanted = theirs[row].grad
        assert wanted is not None
        assert wanted.abs().max() > 0
        assert small.difference(gradient, wanted) <= 1e-4, row


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_those_of_peft_and_adamw(name: str) -> None:
    """From B = 0, as a run begins; the base stays as it was."""
    plan = lora_plan(name)
    values = adapters.random_adapters(plan, begun=False)
    backend = TorchBackend(plan)
    decoder = backend.decoder()
    state = fresh_state(backend, adapters.weights_of(base_of(name), plan, values))
    moving, frozen = split_frozen(state, backend.layout)
    before = {n: t.clone() for n, t in frozen.items()}
    assert {n.partition("/")[2] for n in moving if n.startswith("mu/")} == set(values)
    step, losses = make_train_step(decoder, backend.layout, plan.recipe), []
    for number in range(1, STEPS + 1):
        inputs = small.step_inputs(backend, plan, {**decoder.constants(), **frozen}, number)
        moving, outputs = step(moving, inputs)
        losses.append(outputs["loss"].item())
    assert losses == pytest.approx(peft_losses(name, plan, values), rel=1e-4)
    assert losses[0] > 1.01 * losses[-1], "losses that do not fall would always be equal"
    assert all(torch.equal(before[n], tensor) for n, tensor in frozen.items())


def peft_losses(name: str, plan: Plan, values: dict[str, torch.Tensor]) -> list[float]:
    wrapped, optim = adapters.peft_model(base_of(name), plan, values, CASES[name][1]), plan.recipe.optim
    parameters = list(adapters.adapter_parameters(wrapped).values())
    assert [p for p in wrapped.parameters() if p.requires_grad] == parameters
    adamw = torch.optim.AdamW(
        parameters, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    losses = []
    for number in range(1, STEPS + 1):
        loss = their_loss(wrapped, number)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        adamw.param_groups[0]["lr"] = learning_rate(number, small.PLANNED_STEPS, plan.recipe.schedule, optim)
        adamw.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("fault", ["scale", "A of v_proj", "B of down_proj"])
def test_a_fault_in_an_adapter_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of logits fails when a part of the formula does."""
    adapt = Linear.adapt

    def broken(self: Linear, rank: int, scale: float) -> None:
        adapt(self, rank, 1.0 if fault == "scale" else scale)

    values = adapters.random_adapters(lora_plan("llama"))
    changed = {
        row: tensor * (1.01 if fault[0] in ("A", "B") and f"{fault[5:]}.lora_{fault[0]}" in row else 1.0)
        for row, tensor in values.items()
    }
    monkeypatch.setattr(Linear, "adapt", broken)
    plan, rows = lora_plan("llama"), small.packed_rows()
    decoder, modules = modules_of("llama", plan, changed)
    wrapped = adapters.peft_model(base_of("llama"), plan, values, ALL)
    real = torch.from_numpy(rows.real)
    with torch.no_grad():
        ours = functional_call(decoder, modules, rows.tensors())[..., : small.VOCAB][real]
        theirs = families.outputs_of(wrapped.base_model.model, rows)[0][real]
    assert small.difference(ours, theirs) > 1e-4
