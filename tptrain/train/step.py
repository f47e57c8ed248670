"""The train step: a pure function (state, inputs) -> (state, outputs) in plain PyTorch.

Every backend runs this same function; the XLA backend traces it once and replays what it compiled.
Shapes: A micro-batches, B rows of each, T tokens.
"""

from __future__ import annotations

import torch

from tptrain.backends.base import TORCH_DTYPES, Layout, StepFunction, Tensors
from tptrain.config.schema import OptimSection, Recipe
from tptrain.models.calling import call_method
from tptrain.models.decoder import Decoder
from tptrain.train.state import HALTED, join_parts, part_of

BATCH_NAMES = ("tokens", "targets", "weights", "positions", "segment_ids")
# The same in the order of `Decoder.mean_loss`.
LOSS_NAMES = ("tokens", "positions", "segment_ids", "targets", "weights")
SCALAR_NAMES = ("learning_rate", "bias_correction1", "bias_correction2")


def make_train_step(decoder: Decoder, layout: Layout, recipe: Recipe) -> StepFunction:
    """The step of a recipe.

    inputs:  the batch (BATCH_NAMES, each [A, B, T]), the scalars (SCALAR_NAMES), the decoder's constants.
    outputs: loss (mean over counted tokens), counted (tokens with weight), grad_norm (before clipping),
             finite (1.0 when loss and norm are; otherwise this update and all later ones are left out).
    """
    compute = TORCH_DTYPES[recipe.precision.compute]
    constants = tuple(decoder.constants())

    def train_step(state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        params = part_of(state, "params")
        working = {name: p.detach().to(compute).requires_grad_(True) for name, p in params.items()}
        modules = {**working, **{name: inputs[name] for name in constants}}
        loss, counted, gradients = loss_and_gradients(decoder, modules, working, inputs)
        gradients = {name: g.to(params[name].dtype) for name, g in gradients.items()}
        norm = global_norm(gradients)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        keep_old = (state[HALTED] > 0) | ~finite
        updated = adamw(state, gradients, norm, inputs, layout, recipe.optim)
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


def adamw(
    state: Tensors,
    gradients: Tensors,
    norm: torch.Tensor,
    inputs: Tensors,
    layout: Layout,
    optim: OptimSection,
) -> dict[str, Tensors]:
    """AdamW (arXiv:1711.05101) in the arithmetic of torch.optim.AdamW, after clipping by global norm.

    Elementwise over buffers, so it does not matter how a backend splits or stacks them.
    """
    scale = torch.clamp(optim.clip_norm / (norm + 1e-6), max=1.0) if optim.clip_norm else 1.0
    rate, correction1 = inputs["learning_rate"], inputs["bias_correction1"]
    correction2 = inputs["bias_correction2"].sqrt()
    parts: dict[str, Tensors] = {"params": {}, "mu": {}, "nu": {}}
    for name, buffer in layout.buffers.items():
        gradient = gradients[name] * scale
        mu = state[f"mu/{name}"] * optim.beta1 + gradient * (1 - optim.beta1)
        nu = state[f"nu/{name}"] * optim.beta2 + gradient.square() * (1 - optim.beta2)
        old = state[f"params/{name}"]
        decayed = old * (1 - rate * optim.weight_decay) if buffer.decay and optim.weight_decay else old
        step = (mu / correction1) / (nu.sqrt() / correction2 + optim.eps)
        parts["params"][name], parts["mu"][name], parts["nu"][name] = decayed - rate * step, mu, nu
    return parts
