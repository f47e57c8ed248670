"""The train step: a pure function (state, inputs) -> (state, outputs) in plain PyTorch.

Every backend runs this same function; the XLA backend traces it once and replays what it compiled.
Shapes: A micro-batches, B rows of each, T tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from tptrain.backends.base import TORCH_DTYPES, Apart, Backend, InOrder, Layout, StepFunction, Tensors
from tptrain.config.plan import Plan
from tptrain.config.schema import GuardsSection, OptimSection, Recipe
from tptrain.models.calling import call_method
from tptrain.models.decoder import Decoder
from tptrain.train.optimizers import OPTIMIZERS, Optimizer
from tptrain.train.schedule import NORM_LIMIT, step_scalars
from tptrain.train.state import HALTED, join_parts, part_of, parts_of

# Integers but for the weights, as `Batch` has them.
BATCH_DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "positions": np.int32,
    "segment_ids": np.int32,
}
BATCH_NAMES = tuple(BATCH_DTYPES)
# The same in the order of `Decoder.mean_loss`.
LOSS_NAMES = ("tokens", "positions", "segment_ids", "targets", "weights")

# Numbers of an update besides the optimizer's own: of clipping, and whether everything stays as it is.
_SCALE, _KEEP_OLD = "clip_scale", "keep_old"


def _as_they_are(numbers: Tensors, index: int) -> Tensors:
    return numbers


def _in_any_order(earlier: list[torch.Tensor], later: Tensors) -> tuple[list[torch.Tensor], Tensors]:
    return earlier, later


def prepare_step(backend: Backend, plan: Plan) -> tuple[StepFunction, Tensors]:
    """The step of a plan as this backend runs it, and the decoder's constants on the devices."""
    decoder = backend.decoder()
    constants = {name: backend.put_constant(tensor) for name, tensor in decoder.constants().items()}
    step = make_train_step(decoder, backend.layout, plan.recipe, backend.apart, backend.in_order)
    return step, constants


def step_placeholders(backend: Backend, plan: Plan) -> Tensors:
    """Inputs of the step in their shapes, without values that mean anything: its batch and its scalars."""
    recipe = plan.recipe
    shape = (recipe.optim.accumulation, plan.micro_rows, recipe.data.seq_len)
    batch = backend.put_batch({name: np.zeros(shape, dtype) for name, dtype in BATCH_DTYPES.items()})
    return {**batch, **backend.put_scalars(step_scalars(1, 2, recipe.schedule, recipe.optim))}


def make_train_step(
    decoder: Decoder,
    layout: Layout,
    recipe: Recipe,
    apart: Apart = _as_they_are,
    in_order: InOrder = _in_any_order,
) -> StepFunction:
    """The step of a recipe. apart, in_order: see `Backend`.

    state:   what steps change, from `split_frozen`.
    inputs:  the batch (BATCH_NAMES, each [A, B, T]), `step_scalars`, the decoder's constants, the frozen
             weights as `params/<buffer>`.
    outputs: loss (mean over counted tokens, the router's loss included, see `Decoder.mean_loss`),
             counted (tokens with weight), grad_norm (before clipping), finite (1.0 when loss and norm are),
             spike (1.0 when the norm is finite and above its limit). An update that is not finite, or a
             spike, is left out; and all later ones with it where the recipe's guards stop the run for that.
    """
    compute = TORCH_DTYPES[recipe.precision.compute]
    constants = tuple(decoder.constants())

    def train_step(state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        params = part_of(state, "params")
        working = {name: p.detach().to(compute).requires_grad_(True) for name, p in params.items()}
        frozen = {name: p.detach().to(compute) for name, p in part_of(inputs, "params").items()}
        modules = {**working, **frozen, **{name: inputs[name] for name in constants}}
        loss, counted, gradients = loss_and_gradients(decoder, modules, working, inputs, in_order)
        gradients = {name: g.to(params[name].dtype) for name, g in gradients.items()}
        norm = global_norm(gradients)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        spike = finite & (norm > inputs[NORM_LIMIT])
        halted = _halted(state[HALTED] > 0, finite, spike, recipe.guards)
        keep_old = halted | ~finite | spike
        parts = updated(state, gradients, norm, keep_old, inputs, layout, recipe.optim, apart)
        outputs = {"loss": loss, "counted": counted, "grad_norm": norm}
        outputs |= {"finite": finite.to(loss.dtype), "spike": spike.to(loss.dtype)}
        return join_parts(parts, halted.to(torch.int32)), outputs

    return train_step


def _halted(
    before: torch.Tensor, finite: torch.Tensor, spike: torch.Tensor, guards: GuardsSection
) -> torch.Tensor:
    """Whether a guard has stopped the run, in this step or before.

    The host looks one step late: the devices have to leave out by themselves what follows.
    """
    halted = before
    if guards.non_finite == "stop":
        halted = halted | ~finite
    return halted | spike if guards.spike == "stop" else halted


def loss_and_gradients(
    decoder: Decoder, modules: Tensors, working: Tensors, inputs: Tensors, in_order: InOrder = _in_any_order
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Mean loss over all counted tokens of all micro-batches, their count, and its gradients.

    Each micro-batch contributes its sum divided by the count of the whole batch, so that one batch of 8
    rows and four of 2 give the same loss and gradients; but for the router's loss, which is not a sum over
    tokens: each micro-batch has its own, and theirs are averaged by counted tokens.

    in_order: see `Backend.in_order`; without it a compiler may begin a micro-batch while activations of the
    one before are still kept.
    """
    counted = inputs["weights"].sum()
    total = counted.clamp(min=1.0)
    losses: list[torch.Tensor] = []
    sums: list[torch.Tensor] | None = None
    for micro in range(inputs["tokens"].shape[0]):
        batch = {name: inputs[name][micro] for name in BATCH_NAMES}
        if sums is not None:
            sums, batch = in_order(sums, batch)
        arguments = (*(batch[name] for name in LOSS_NAMES), total)
        loss = call_method(decoder, "mean_loss", modules, arguments)
        gradients = torch.autograd.grad(loss, list(working.values()))
        wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        sums = wide if sums is None else [s + g for s, g in zip(sums, wide, strict=True)]
        losses.append(loss.detach())
    assert sums is not None
    return torch.stack(losses).sum(), counted, dict(zip(working, sums, strict=True))


def global_norm(gradients: Tensors) -> torch.Tensor:
    """Euclidean norm over all gradients together."""
    return torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()


def updated(
    state: Tensors,
    gradients: Tensors,
    norm: torch.Tensor,
    keep_old: torch.Tensor,
    inputs: Tensors,
    layout: Layout,
    optim: OptimSection,
    apart: Apart = _as_they_are,
) -> dict[str, Tensors]:
    """The parts of the state after an update with these gradients, clipped; as they are where `keep_old`.

    norm: of the gradients. inputs: of the step, for its scalars. apart: see `Backend.apart`.
    """
    optimizer = OPTIMIZERS[optim.name]
    numbers = _update_numbers(inputs, norm, keep_old, optimizer, optim)
    before, parts = parts_of(state), dict[str, Tensors]()
    for index, (name, gradient) in enumerate(gradients.items()):
        old = {part: tensors[name] for part, tensors in before.items() if name in tensors}
        own = apart(numbers, index)
        scaled = gradient * own[_SCALE] if _SCALE in own else gradient
        new = optimizer.update(old, scaled, own, layout.buffers[name], optim)
        for part, tensor in new.items():
            parts.setdefault(part, {})[name] = torch.where(own[_KEEP_OLD], old[part], tensor)
    return parts


def _update_numbers(
    inputs: Tensors, norm: torch.Tensor, keep_old: torch.Tensor, optimizer: Optimizer, optim: OptimSection
) -> Tensors:
    """All numbers that the update of any buffer needs, as scalar tensors."""
    rate = inputs["learning_rate"]
    scalars = {name: inputs[name] for name in ("learning_rate", *optimizer.scalars(1, optim))}
    constants = {n: torch.full_like(rate, value) for n, value in optimizer.constants(optim).items()}
    scale = {_SCALE: torch.clamp(optim.clip_norm / (norm + 1e-6), max=1.0)} if optim.clip_norm else {}
    return {**scalars, **constants, **scale, _KEEP_OLD: keep_old}
