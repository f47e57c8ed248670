"""Adafactor, bfloat16 moments and frozen weights on the torch backend, against other code and by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.optimization import Adafactor

from tests import small
from tptrain.backends.base import Buffer, Layout, Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config import OptimSection, Plan, ScheduleSection
from tptrain.config.state_parts import state_parts
from tptrain.family import ParamRow
from tptrain.train.optimizers import OPTIMIZERS
from tptrain.train.schedule import learning_rate, step_scalars
from tptrain.train.state import fresh_state, part_of, split_frozen
from tptrain.train.step import global_norm, loss_and_gradients, make_train_step, updated

BIASED = small.small_config(attention_bias=True, mlp_bias=True)
STEPS = 20


@cache
def weights() -> Tensors:
    return small.weights_of(small.reference_model(BIASED))


class Training:
    """Steps of a plan on the torch backend."""

    def __init__(self, plan: Plan, source: Tensors | None = None):
        self.plan, self.backend = plan, TorchBackend(plan)
        self.decoder = self.backend.decoder()
        state = fresh_state(self.backend, small.DictSource(source or weights()))
        self.state, self.frozen = split_frozen(state, self.backend.layout)
        self.step = make_train_step(self.decoder, self.backend.layout, plan.recipe)

    def inputs(self, step: int) -> Tensors:
        constants = {**self.decoder.constants(), **self.frozen}
        return small.step_inputs(self.backend, self.plan, constants, step)

    def take(self, step: int) -> Tensors:
        self.state, outputs = self.step(self.state, self.inputs(step))
        assert outputs["finite"] == 1
        return outputs

    def gradients(self, step: int) -> Tensors:
        """Of the weights as they are, for the batch of a step."""
        inputs = self.inputs(step)
        working = {n: p.clone().requires_grad_(True) for n, p in part_of(self.state, "params").items()}
        frozen = {n: p.to(torch.float32) for n, p in part_of(self.frozen, "params").items()}
        modules = {**working, **frozen, **self.decoder.constants()}
        return loss_and_gradients(self.decoder, modules, working, inputs)[2]


def rate_of(plan: Plan, step: int) -> float:
    recipe = plan.recipe
    return learning_rate(step, small.PLANNED_STEPS, recipe.schedule, recipe.optim)


# Adafactor.

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decayed and clipped": {"weight_decay": 0.3, "clip_norm": 0.5},
    "momentum": {"momentum": 0.9, "beta2_decay": 0.7, "update_clip": 0.5},
    "scaled by the weights": {"scale_parameter": True, "learning_rate": 0.05},
}


@pytest.mark.parametrize("case", CASES)
def test_adafactor_equals_transformers(case: str) -> None:
    """20 updates with the gradients of the model, biases and norms included."""
    settings = {"name": "adafactor", "weight_decay": 0.0, "clip_norm": 0.0, **CASES[case]}
    plan = small.torch_plan(config=BIASED, optim=settings)
    run, optim = Training(plan), plan.recipe.optim
    theirs = {n: p.clone().requires_grad_(True) for n, p in part_of(run.state, "params").items()}
    matrices = [p for p in theirs.values() if p.ndim == 2]
    vectors = [p for p in theirs.values() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    reference = Adafactor(
        groups,
        lr=1.0,
        eps=(1e-30, 1e-3),
        clip_threshold=optim.update_clip,
        decay_rate=-optim.beta2_decay,
        beta1=optim.momentum or None,
        scale_parameter=optim.scale_parameter,
        relative_step=False,
    )
    first = {n: p.detach().clone() for n, p in theirs.items()}
    for step in range(1, STEPS + 1):
        for name, gradient in run.gradients(step).items():
            theirs[name].grad = gradient
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), optim.clip_norm)
        for group in reference.param_groups:
            group["lr"] = rate_of(plan, step)
        reference.step()
        run.take(step)
    for name, parameter in theirs.items():
        moved = parameter.detach() - first[name]
        ours = run.state[f"params/{name}"]
        assert small.difference(ours, parameter.detach()) <= 1e-5, name
        assert small.difference(ours - first[name], moved) <= 1e-3, f"{name}: what was learnt"
        held = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_row": "exp_avg_sq_row", "nu_col": "exp_avg_sq_col"}
        kept = reference.state[parameter]
        assert {p for p in held if f"{p}/{name}" in run.state} == {p for p in held if held[p] in kept}
        for part, key in held.items():
            if key in kept:
                assert small.difference(run.state[f"{part}/{name}"], kept[key]) <= 1e-4, (part, name)


def test_what_adafactor_keeps_is_small() -> None:
    plan = small.torch_plan(config=BIASED, optim={"name": "adafactor"})
    state = Training(plan).state
    names = ("nu_row/lm_head.weight", "nu_col/lm_head.weight", "nu_row/model.layers.1.mlp.up_proj.weight")
    assert [tuple(state[name].shape) for name in names] == [(1031,), (120,), (176,)]
    assert list(plan.parts) == ["params", "nu", "nu_row", "nu_col"]
    beside = sum(t.nbytes for n, t in state.items() if not n.startswith("params/") and n != "halted")
    assert beside < 0.04 * sum(t.nbytes for t in part_of(state, "params").values())


def rows_alike(count: int, size: tuple[int, ...], padded: tuple[int, ...]) -> list[ParamRow]:
    dims = ("vocab", "embed")[-len(size) :]
    return [ParamRow(f"model.layers.{i}.w", dims, size, padded) for i in range(count)]


@pytest.mark.parametrize(("size", "padded"), [((7, 5), (8, 5)), ((6,), (6,))])
def test_stacked_and_padded_rows_get_the_numbers_of_single_ones(
    size: tuple[int, ...], padded: tuple[int, ...]
) -> None:
    """Three layers of very different gradients in one buffer, padded, against each by itself and unpadded."""
    optim = OptimSection(
        name="adafactor", momentum=0.5, scale_parameter=True, weight_decay=0.1, clip_norm=0.0
    )
    rows, generator = rows_alike(3, size, padded), torch.Generator().manual_seed(5)
    inside = tuple(slice(0, n) for n in size)

    def padded_random(scale: float) -> torch.Tensor:
        full = torch.zeros(padded)
        full[inside] = torch.randn(size, generator=generator) * scale
        return full

    params = [padded_random(0.1 * 10**i) for i in range(3)]
    gradients = [[padded_random(10.0 ** (i - 2)) for i in range(3)] for _ in range(4)]

    def run(layout: Layout, names: list[str], stack: bool) -> list[Tensors]:
        spec = ((),) * len(size)
        parts = state_parts(rows, {row.name: spec for row in rows}, optim)
        singles = [
            {
                p: (params[i] if p == "params" else torch.zeros(part.rows[i].padded_size))
                for p, part in parts.items()
            }
            for i in range(3)
        ]
        together = {p: torch.stack([single[p] for single in singles]) for p in parts}
        held = [together] if stack else singles
        state = {f"{p}/{n}": t for n, tensors in zip(names, held, strict=True) for p, t in tensors.items()}
        for step, those in enumerate(gradients, 1):
            scalars = step_scalars(step, 10, ScheduleSection(max_steps=10), optim)
            given = [torch.stack(those)] if stack else those
            inputs = {name: torch.tensor(value) for name, value in scalars.items()}
            asked = dict(zip(names, given, strict=True))
            norm, go_on = torch.tensor(1.0), torch.tensor(False)
            new = updated(state, asked, norm, go_on, inputs, layout, optim)
            state = {f"{p}/{n}": t for p, tensors in new.items() for n, t in tensors.items()}
        return [{p: state[f"{p}/{n}"] for p in parts} for n in names]

    whole = ((),) * len(size)
    (stacked,) = run(Layout([Buffer("s", tuple(rows), True, ((), *whole))]), ["s"], True)
    unpadded = [ParamRow(row.name, row.dims, size, size) for row in rows]
    names = [row.name for row in rows]
    params, gradients = [p[inside] for p in params], [[g[inside] for g in those] for those in gradients]
    rows = unpadded
    singles = run(Layout([Buffer(r.name, (r,), False, whole) for r in rows]), names, False)
    for part, tensor in stacked.items():
        for layer, single in enumerate(singles):
            ours = tensor[layer][tuple(slice(0, n) for n in single[part].shape)]
            assert small.difference(ours, single[part]) <= 1e-6, (part, layer)
    assert not stacked["params"][:, size[0] :].any(), "padding must not learn"


def test_what_changes_with_the_step_is_an_input() -> None:
    section = ScheduleSection(max_steps=40)
    scalars = {s: step_scalars(s, 40, section, OptimSection(name="adafactor")) for s in (1, 2, 32)}
    assert scalars[1]["second_moment_rate"] == 1
    assert scalars[32]["second_moment_rate"] == pytest.approx(2**-4)
    assert set(scalars[2]) == {"learning_rate", "norm_limit", "second_moment_rate"}
    assert set(OPTIMIZERS) == {"adamw", "adafactor"}


# Moments in bfloat16.


def test_bfloat16_moments_by_hand() -> None:
    """Read, computed in float32, used as computed, stored rounded to nearest even: bit for bit."""
    plan = small.torch_plan(config=BIASED, optim={"moments_dtype": "bfloat16", "clip_norm": 0.0})
    run, optim = Training(plan), plan.recipe.optim
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in part_of(run.state, "params").items()}
    for step in range(1, 6):
        gradients, before = run.gradients(step), part_of(run.state, "params")
        run.take(step)
        rate = torch.tensor(rate_of(plan, step))
        corrections = [torch.tensor(1 - beta**step) for beta in (optim.beta1, optim.beta2)]
        for name, gradient in gradients.items():
            mu = moments[name][0] * optim.beta1 + gradient * (1 - optim.beta1)
            nu = moments[name][1] * optim.beta2 + gradient.square() * (1 - optim.beta2)
            step_size = (mu / corrections[0]) / (nu.sqrt() / corrections[1].sqrt() + optim.eps)
            decayed = before[name] * (1 - rate * 0.1) if gradient.ndim == 2 else before[name]
            assert torch.equal(run.state[f"params/{name}"], decayed - rate * step_size), name
            for part, value in (("mu", mu), ("nu", nu)):
                stored = run.state[f"{part}/{name}"]
                assert stored.dtype == torch.bfloat16
                assert torch.equal(stored.float(), rounded_to_nearest_even(value)), (part, name)
            moments[name] = (rounded_to_nearest_even(mu), rounded_to_nearest_even(nu))


def rounded_to_nearest_even(x: torch.Tensor) -> torch.Tensor:
    """A finite float32 with the lower 16 bits rounded away, in integer arithmetic."""
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return torch.where(kept >= 2**31, kept - 2**32, kept).to(torch.int32).view(torch.float32)


def test_a_moment_in_bfloat16_falls_at_the_slowest_decay_that_is_allowed() -> None:
    """0.996 of any bfloat16 rounds to a smaller one; 0.997 does not, which is why it is refused."""
    numbers = torch.arange(128, 256).to(torch.bfloat16)
    assert ((numbers.float() * 0.996).to(torch.bfloat16) < numbers).all()
    assert not ((numbers.float() * 0.997).to(torch.bfloat16) < numbers).all()


# Frozen weights.

TRAINABLE = ("model.layers.*.self_attn.*", "model.norm.weight")


def test_training_a_subset_equals_adamw_on_it() -> None:
    plan = small.torch_plan(config=BIASED, optim={"weight_decay": 0.3}, trainable=TRAINABLE)
    run = Training(plan)
    trained = {n for n in weights() if ".self_attn." in n or n == "model.norm.weight"}
    assert set(part_of(run.state, "params")) == set(part_of(run.state, "mu")) == trained
    held = {n: p.clone() for n, p in part_of(run.frozen, "params").items()}
    assert set(held) == set(weights()) - trained
    assert all(torch.equal(p, weights()[n].to(torch.bfloat16)) for n, p in held.items())
    theirs = {n: p.clone().requires_grad_(True) for n, p in part_of(run.state, "params").items()}
    groups = [
        {"params": [p for p in theirs.values() if p.ndim == dims], "weight_decay": decay}
        for dims, decay in ((2, 0.3), (1, 0.0))
    ]
    optim = plan.recipe.optim
    reference = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    for step in range(1, STEPS + 1):
        gradients = run.gradients(step)
        for name, gradient in gradients.items():
            theirs[name].grad = gradient
        norm = global_norm(gradients)
        torch.nn.utils.clip_grad_norm_(theirs.values(), optim.clip_norm)
        for group in reference.param_groups:
            group["lr"] = rate_of(plan, step)
        reference.step()
        assert run.take(step)["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in theirs.items():
        assert small.difference(run.state[f"params/{name}"], parameter.detach()) <= 1e-5, name
    assert all(torch.equal(p, held[n]) for n, p in part_of(run.frozen, "params").items())


class Shapes(TorchDispatchMode):
    """Shapes of all matrices that products give, one by one or in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.found.append(tuple(result.shape)[-2:])
        return result


@pytest.mark.parametrize("remat", ["none", "full"])
def test_frozen_weights_have_no_gradients(remat: str) -> None:
    """A product of the shape of a weight, as PyTorch transposes it, is the weight's gradient."""
    counts = {}
    for trainable in (("*",), TRAINABLE):
        run = Training(small.torch_plan(config=BIASED, trainable=trainable, remat=remat))
        with Shapes() as shapes:
            run.take(1)
        counts[trainable] = {size: shapes.found.count(size) for size in ((176, 120), (240, 120), (1031, 120))}
    assert counts[("*",)] == {(176, 120): 6, (240, 120): 3, (1031, 120): 1}
    assert counts[TRAINABLE] == {(176, 120): 0, (240, 120): 3, (1031, 120): 0}
