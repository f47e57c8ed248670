"""The train step and its parts on the torch backend, against PyTorch's own optimizer and by hand."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any

import pytest
import torch

from tests import small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config import GuardsSection, OptimSection, Plan, ScheduleSection
from tptrain.models.decoder import Block
from tptrain.train.schedule import learning_rate, step_scalars
from tptrain.train.state import HALTED, fresh_state, part_of
from tptrain.train.step import global_norm, loss_and_gradients, make_train_step, updated

BIASED = small.small_config(attention_bias=True, mlp_bias=True)


@cache
def weights(biased: bool = False) -> Tensors:
    return small.weights_of(small.reference_model(BIASED) if biased else small.reference())


class Training:
    """A plan on the torch backend, with its state and step."""

    def __init__(self, plan: Plan, source: Tensors):
        self.plan = plan
        self.backend = TorchBackend(plan)
        self.decoder = self.backend.decoder()
        self.constants = self.decoder.constants()
        self.state = fresh_state(self.backend, small.DictSource(source))
        self.step = make_train_step(self.decoder, self.backend.layout, plan.recipe)

    def inputs(self, step: int) -> Tensors:
        return small.step_inputs(self.backend, self.plan, self.constants, step)

    def gradients(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        params = part_of(self.state, "params")
        working = {name: p.clone().requires_grad_(True) for name, p in params.items()}
        return loss_and_gradients(self.decoder, {**working, **self.constants}, working, inputs)


# The schedule.

OPTIM = OptimSection(learning_rate=0.5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # step -> rate, for a run of 10 steps and a peak of 0.5
        ({"kind": "constant"}, {1: 0.5, 10: 0.5}),
        ({"kind": "constant", "warmup_steps": 4}, {1: 0.125, 2: 0.25, 4: 0.5, 5: 0.5, 10: 0.5}),
        ({"kind": "linear", "warmup_steps": 2}, {1: 0.25, 2: 0.5, 6: 0.25, 10: 0.0}),
        ({"kind": "linear", "final_ratio": 0.2}, {1: 0.46, 5: 0.3, 10: 0.1}),
        ({"kind": "cosine", "warmup_steps": 2}, {2: 0.5, 4: 0.25 * (1 + math.sqrt(0.5)), 6: 0.25, 10: 0.0}),
        ({"kind": "cosine", "warmup_steps": 2, "final_ratio": 0.1}, {2: 0.5, 6: 0.275, 10: 0.05}),
        ({"kind": "cosine"}, {1: 0.25 * (1 + math.cos(math.pi / 10)), 5: 0.25, 10: 0.0}),
    ],
)
def test_learning_rate_at_chosen_steps(schedule: dict[str, Any], expected: dict[int, float]) -> None:
    section = ScheduleSection(max_steps=10, **schedule)
    for step, rate in expected.items():
        assert learning_rate(step, 10, section, OPTIM) == pytest.approx(rate, rel=1e-12, abs=1e-17), step


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_learning_rate_rises_then_never_rises_again(kind: Any) -> None:
    section = ScheduleSection(max_steps=40, kind=kind, warmup_steps=7, final_ratio=0.1)
    rates = [learning_rate(step, 40, section, OPTIM) for step in range(1, 41)]
    assert rates[:7] == sorted(rates[:7]) and rates[6] == max(rates) == 0.5
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates == [learning_rate(step, 40, section, OPTIM) for step in range(1, 41)], "a pure function"


def test_bias_corrections_are_those_of_the_step() -> None:
    scalars = step_scalars(3, 10, ScheduleSection(max_steps=10), OptimSection(beta1=0.9, beta2=0.95))
    assert scalars["bias_correction1"] == pytest.approx(1 - 0.9**3)
    assert scalars["bias_correction2"] == pytest.approx(1 - 0.95**3)


# The optimizer.


@pytest.mark.parametrize(("format", "tolerance"), [("float32", 1e-6), ("float64", 1e-13)])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_equals_torch_optim(format: str, tolerance: float, clip_norm: float) -> None:
    """Seven steps on the same gradients, some above the clipping norm and some below it."""
    plan = small.torch_plan(config=BIASED, format=format, optim={"weight_decay": 0.3, "clip_norm": clip_norm})
    optim, schedule = plan.recipe.optim, plan.recipe.schedule
    run = Training(plan, weights(biased=True))
    reference = {name: p.clone().requires_grad_(True) for name, p in part_of(run.state, "params").items()}
    decayed = [p for p in reference.values() if p.ndim == 2]
    kept = [p for p in reference.values() if p.ndim == 1]
    assert len(kept) == 3 * (7 + 2) + 1, "norms and biases"
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    norms = []
    for step in range(1, 8):
        scale = 1e-5 * 10 ** (step % 4)
        generator = torch.Generator().manual_seed(step)
        gradients = {
            n: torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale for n, p in reference.items()
        }
        scalars = run.backend.put_scalars(step_scalars(step, small.PLANNED_STEPS, schedule, optim))
        norms.append(global_norm(gradients))
        go_on = torch.tensor(False)
        parts = updated(run.state, gradients, norms[-1], go_on, scalars, run.backend.layout, optim)
        run.state.update({f"{part}/{name}": t for part in parts for name, t in parts[part].items()})
        for name, parameter in reference.items():
            parameter.grad = gradients[name].clone()
        if clip_norm:
            assert torch.nn.utils.clip_grad_norm_(reference.values(), clip_norm).item() == pytest.approx(
                norms[-1].item(), rel=1e-5
            )
        for group in theirs.param_groups:
            group["lr"] = learning_rate(step, small.PLANNED_STEPS, schedule, optim)
        theirs.step()
    assert min(norms) < 1 < max(norms), "the clipping norm must lie between the gradients' norms"
    for name, parameter in reference.items():
        moments = theirs.state[parameter]
        pairs = {"params": parameter.detach(), "mu": moments["exp_avg"], "nu": moments["exp_avg_sq"]}
        for part, expected in pairs.items():
            assert small.difference(run.state[f"{part}/{name}"], expected) <= tolerance, (part, name)


def test_decay_acts_on_matrices_alone() -> None:
    """With no token counted the gradients are zero, and what is left of an update is the decay."""
    plan = small.torch_plan(config=BIASED, optim={"weight_decay": 0.3})
    run = Training(plan, weights(biased=True))
    inputs = run.inputs(1)
    inputs["weights"] = torch.zeros_like(inputs["weights"])
    after, outputs = run.step(run.state, inputs)
    assert outputs["loss"] == 0 and outputs["counted"] == 0 and outputs["finite"] == 1
    factor = 1 - inputs["learning_rate"] * 0.3
    for name, old in part_of(run.state, "params").items():
        expected = old * factor if old.ndim == 2 else old
        assert torch.equal(part_of(after, "params")[name], expected), name


# The step as a whole.


def test_the_step_is_pure_and_reports_what_it_did() -> None:
    run = Training(small.torch_plan(), weights())
    before = {name: t.clone() for name, t in run.state.items()}
    inputs = run.inputs(1)
    loss, counted, gradients = run.gradients(inputs)
    after, outputs = run.step(run.state, inputs)
    again, _ = run.step(run.state, inputs)
    assert all(torch.equal(run.state[name], tensor) for name, tensor in before.items())
    assert set(after) == set(before) and all(torch.equal(after[name], again[name]) for name in after)
    assert not any(torch.equal(after[f"params/{n}"], before[f"params/{n}"]) for n in gradients)
    assert outputs["counted"] == counted == inputs["weights"].sum() > 0
    assert outputs["loss"] == loss.detach()
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).double().norm()
    assert outputs["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)


def test_loss_equals_cross_entropy_of_transformers() -> None:
    run = Training(small.torch_plan(), weights())
    inputs = run.inputs(1)
    loss, _, _ = run.gradients(inputs)
    rows = small.Rows(*(inputs[name][0].numpy() for name in ("tokens", "positions", "segment_ids")))
    logits = small.reference_logits(small.reference(), rows)
    counts = inputs["weights"][0] > 0
    expected = torch.nn.functional.cross_entropy(logits[counts], inputs["targets"][0][counts].long())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("format", "loss_gap", "gradient_gap"), [("float32", 1e-6, 1e-5), ("float64", 1e-12, 1e-10)]
)
def test_accumulation_does_not_change_loss_or_gradients(
    format: str, loss_gap: float, gradient_gap: float
) -> None:
    """One micro-batch of 8 rows and four of 2, with different numbers of counted tokens in each."""
    run = Training(small.torch_plan(format=format), weights())
    at_once = run.inputs(1)
    in_parts = {n: t.reshape(4, 2, -1) if t.ndim == 3 else t for n, t in at_once.items()}
    counts = in_parts["weights"].sum((1, 2))
    assert counts.max() > 2 * counts.min() > 0
    loss, counted, gradients = run.gradients(at_once)
    parts_loss, parts_counted, parts_gradients = run.gradients(in_parts)
    assert counted == parts_counted
    assert parts_loss.item() == pytest.approx(loss.item(), rel=loss_gap)
    for name, gradient in gradients.items():
        assert small.difference(parts_gradients[name], gradient) <= gradient_gap, name
    means = [
        run.gradients({n: t[i : i + 1] if t.ndim == 3 else t for n, t in in_parts.items()})[0]
        for i in range(4)
    ]
    mean_of_means = torch.stack(means).mean().item()
    assert abs(mean_of_means - loss.item()) > 100 * loss_gap * loss.item(), "the check can tell them apart"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def poisoned_weight(run: Training, inputs: Tensors) -> None:
    run.state["params/model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def infinite_loss(run: Training, inputs: Tensors) -> None:
    """One target weighs so much that the loss overflows, while every gradient stays finite."""
    inputs["weights"].zero_()
    inputs["weights"][0, 1, 4] = 1e38


def infinite_gradients(run: Training, inputs: Tensors) -> None:
    """The loss is finite, the norm of its gradients is not."""
    run.state["params/lm_head.weight"] *= 1e-19
    run.state["params/model.norm.weight"].fill_(1e37)


@pytest.mark.parametrize("spoil", [poisoned_weight, infinite_loss, infinite_gradients])
def test_what_is_not_finite_stops_the_run_before_the_update(spoil: Any) -> None:
    run = Training(small.torch_plan(), weights())
    run.state, _ = run.step(run.state, run.inputs(1))
    inputs = run.inputs(2)
    spoil(run, inputs)
    before = {name: t.clone() for name, t in run.state.items()}
    halted, outputs = run.step(run.state, inputs)
    assert outputs["finite"] == 0
    if spoil is infinite_loss:
        assert outputs["loss"].isinf() and outputs["grad_norm"].isfinite()
    if spoil is infinite_gradients:
        assert outputs["loss"].isfinite() and not outputs["grad_norm"].isfinite()
    assert halted[HALTED] == 1
    assert all(same_bits(halted[name], before[name]) for name in before if name != HALTED)
    later, outputs = run.step(halted, run.inputs(3))
    assert (outputs["finite"] == 1) == (spoil is infinite_loss), "the next batch is sound"
    assert later[HALTED] == 1
    assert all(same_bits(later[name], before[name]) for name in before if name != HALTED)


def guarded(run: Training, **guards: Any) -> None:
    """Give a run the step of a recipe with these guards."""
    recipe = dataclasses.replace(run.plan.recipe, guards=GuardsSection(**guards))
    run.step = make_train_step(run.decoder, run.backend.layout, recipe)


def test_a_step_that_is_skipped_leaves_the_state_and_the_next_one_goes_on() -> None:
    run = Training(small.torch_plan(), weights())
    guarded(run, non_finite="skip")
    run.state, _ = run.step(run.state, run.inputs(1))
    bad = run.inputs(2)
    infinite_loss(run, bad)
    skipped, outputs = run.step(run.state, bad)
    assert outputs["finite"] == 0 and outputs["spike"] == 0
    assert skipped[HALTED] == 0
    assert all(same_bits(skipped[name], run.state[name]) for name in run.state if name != HALTED)
    after, outputs = run.step(skipped, run.inputs(3))
    straight, _ = run.step(run.state, run.inputs(3))
    assert outputs["finite"] == 1 and all(torch.equal(after[name], straight[name]) for name in after)
    assert not same_bits(after["params/lm_head.weight"], skipped["params/lm_head.weight"])


@pytest.mark.parametrize("spike", ["skip", "stop"])
def test_a_norm_above_its_limit_is_a_spike_and_one_at_it_is_not(spike: Any) -> None:
    run = Training(small.torch_plan(), weights())
    guarded(run, spike_factor=2, spike=spike)
    inputs = run.inputs(1)
    norm = run.step(run.state, inputs)[1]["grad_norm"]
    applied, outputs = run.step(run.state, {**inputs, "norm_limit": norm})
    assert outputs["spike"] == 0 and outputs["finite"] == 1
    assert not same_bits(applied["params/lm_head.weight"], run.state["params/lm_head.weight"])
    left, outputs = run.step(run.state, {**inputs, "norm_limit": torch.nextafter(norm, norm * 0)})
    assert outputs["spike"] == 1 and outputs["finite"] == 1
    assert left[HALTED] == (1 if spike == "stop" else 0)
    assert all(same_bits(left[name], run.state[name]) for name in left if name != HALTED)
    later, _ = run.step(left, inputs)
    is_left = same_bits(later["params/lm_head.weight"], run.state["params/lm_head.weight"])
    assert is_left == (spike == "stop")


def test_what_is_not_finite_is_no_spike() -> None:
    run = Training(small.torch_plan(), weights())
    guarded(run, non_finite="skip", spike="stop", spike_factor=2)
    inputs = run.inputs(1)
    infinite_gradients(run, inputs)
    left, outputs = run.step(run.state, {**inputs, "norm_limit": torch.tensor(1.0)})
    assert outputs["finite"] == 0 and outputs["spike"] == 0 and left[HALTED] == 0


def test_full_remat_computes_layers_twice_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: calls.append(1) or original(*args))
    found = {}
    for policy in ("none", "full"):
        calls.clear()
        run = Training(small.torch_plan(remat=policy), weights())
        found[policy] = run.gradients(run.inputs(1))
        layers = run.plan.facts.num_hidden_layers
        assert len(calls) == layers * (2 if policy == "full" else 1)
    assert found["none"][0] == found["full"][0]
    for name, gradient in found["none"][2].items():
        assert small.difference(found["full"][2][name], gradient) <= 1e-7, name


def test_a_learning_rate_of_zero_moves_the_moments_alone() -> None:
    run = Training(small.torch_plan(), weights())
    inputs = run.inputs(1)
    inputs["learning_rate"] = torch.zeros_like(inputs["learning_rate"])
    after, _ = run.step(run.state, inputs)
    for name, old in part_of(run.state, "params").items():
        assert torch.equal(after[f"params/{name}"], old)
        assert after[f"mu/{name}"].abs().max() > 0
