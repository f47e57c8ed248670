"""The train step: a pure function (state, inputs) -> (state, outputs) in plain PyTorch.

Every backend runs this same function; the XLA backend traces it once and replays what it compiled.
Shapes: A micro-batches, B rows of each, T tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from tptrain.backends.base import TORCH_DTYPES, Backend, Layout, StepFunction, Tensors
from tptrain.config.plan import Plan
from tptrain.config.schema import Recipe
from tptrain.models.calling import call_method
from tptrain.models.decoder import Decoder
from tptrain.train.optimizers import OPTIMIZERS
from tptrain.train.schedule import step_scalars
from tptrain.train.state import HALTED, join_parts, part_of

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


def prepare_step(backend: Backend, plan: Plan) -> tuple[StepFunction, Tensors]:
    """The step of a plan as this backend runs it, and the decoder's constants on the devices."""
    decoder = backend.decoder()
    constants = {name: backend.put_constant(tensor) for name, tensor in decoder.constants().items()}
    return make_train_step(decoder, backend.layout, plan.recipe), constants


def step_placeholders(backend: Backend, plan: Plan) -> Tensors:
    """Inputs of the step in their shapes, without values that mean anything: its batch and its scalars."""
    recipe = plan.recipe
    shape = (recipe.optim.accumulation, plan.micro_rows, recipe.data.seq_len)
    batch = backend.put_batch({name: np.zeros(shape, dtype) for name, dtype in BATCH_DTYPES.items()})
    return {**batch, **backend.put_scalars(step_scalars(1, 2, recipe.schedule, recipe.optim))}


def make_train_step(decoder: Decoder, layout: Layout, recipe: Recipe) -> StepFunction:
    """The step of a recipe.

    state:   what steps change, from `split_frozen`.
    inputs:  the batch (BATCH_NAMES, each [A, B, T]), `step_scalars`, the decoder's constants, the frozen
             weights as `params/<buffer>`.
    outputs: loss (mean over counted tokens), counted (tokens with weight), grad_norm (before clipping),
             finite (1.0 when loss and norm are; otherwise this update and all later ones are left out).
    """
    compute = TORCH_DTYPES[recipe.precision.compute]
    constants = tuple(decoder.constants())
    optimizer = OPTIMIZERS[recipe.optim.name]

    def train_step(state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        params = part_of(state, "params")
        working = {name: p.detach().to(compute).requires_grad_(True) for name, p in params.items()}
        frozen = {name: p.detach().to(compute) for name, p in part_of(inputs, "params").items()}
        modules = {**working, **frozen, **{name: inputs[name] for name in constants}}
        loss, counted, gradients = loss_and_gradients(decoder, modules, working, inputs)
        gradients = {name: g.to(params[name].dtype) for name, g in gradients.items()}
        norm = global_norm(gradients)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        keep_old = (state[HALTED] > 0) | ~finite
        gradients = clipped(gradients, norm, recipe.optim.clip_norm)
        updated = optimizer.update(state, gradients, inputs, layout, recipe.optim)
        parts = {
            part: {n: torch.where(keep_old, old, updated[part][n]) for n, old in part_of(state, part).items()}
            for part in updated
        }
        outputs = {"loss": loss, "counted": counted, "grad_norm": norm, "finite": finite.to(loss.dtype)}
        return join_parts(parts, keep_old.to(torch.int32)), outputs

    return train_step


def loss_and_gradients(
    decoder: Decoder, modules: Tensors, working: Tensors, inputs: Tensors
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Mean loss over all counted tokens of all micro-batches, their count, and its gradients.

    Each micro-batch contributes its sum divided by the count of the whole batch, so that one batch of 8
    rows and four of 2 give the same loss and gradients.
    """
    counted = inputs["weights"].sum()
    total = counted.clamp(min=1.0)
    losses, sums = [], None
    for micro in range(inputs["tokens"].shape[0]):
        batch = {name: inputs[name][micro] for name in BATCH_NAMES}
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


def clipped(gradients: Tensors, norm: torch.Tensor, limit: float) -> Tensors:
    """Gradients scaled to a global norm of at most `limit`; as they are for a limit of 0."""
    if not limit:
        return gradients
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    return {name: gradient * scale for name, gradient in gradients.items()}
