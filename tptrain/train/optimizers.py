"""The optimizers: what a step does with gradients. `tptrain.config.state_parts` has what each of them keeps.

Arithmetic is in the format of the master weights. An update uses the new moments as they were computed; they
are stored, and read by the next step, in the format of their buffer. Whatever changes with the step is an
input, so that all steps are one program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tptrain.backends.base import Buffer, Layout, Tensors
from tptrain.config.schema import OptimSection
from tptrain.config.state_parts import PARAMS, is_factored

# Adafactor's two constants (arXiv:1804.04235, section 9): added to squared gradients; the least size of a
# weight that the learning rate is multiplied by.
_SQUARE_EPS = 1e-30
_SCALE_EPS = 1e-3

# (state, gradients by buffer, inputs of the step, layout of the weights, settings) -> the new state by part
Update = Callable[[Tensors, Tensors, Tensors, Layout, OptimSection], dict[str, Tensors]]


@dataclass(frozen=True)
class Optimizer:
    """update: from the clipped gradients to the new weights and moments.

    scalars: step (from 1) -> the numbers, besides the learning rate, that `update` reads from the inputs.
    """

    update: Update
    scalars: Callable[[int, OptimSection], dict[str, float]]


def adamw(
    state: Tensors, gradients: Tensors, inputs: Tensors, layout: Layout, optim: OptimSection
) -> dict[str, Tensors]:
    """AdamW (arXiv:1711.05101) in the arithmetic of torch.optim.AdamW.

    Elementwise over buffers, so it does not matter how a backend splits or stacks them.
    """
    rate, correction1 = inputs["learning_rate"], inputs["bias_correction1"]
    correction2 = inputs["bias_correction2"].sqrt()
    parts: dict[str, Tensors] = {PARAMS: {}, "mu": {}, "nu": {}}
    for name, gradient in gradients.items():
        old_mu, old_nu = state[f"mu/{name}"], state[f"nu/{name}"]
        mu = old_mu.to(gradient.dtype) * optim.beta1 + gradient * (1 - optim.beta1)
        nu = old_nu.to(gradient.dtype) * optim.beta2 + gradient.square() * (1 - optim.beta2)
        step = (mu / correction1) / (nu.sqrt() / correction2 + optim.eps)
        decayed = _decayed(state[f"{PARAMS}/{name}"], layout.buffers[name], rate, optim)
        parts[PARAMS][name] = decayed - rate * step
        parts["mu"][name], parts["nu"][name] = mu.to(old_mu.dtype), nu.to(old_nu.dtype)
    return parts


def adamw_scalars(step: int, optim: OptimSection) -> dict[str, float]:
    """1 - beta^step of Adam (arXiv:1412.6980, algorithm 1)."""
    return {"bias_correction1": 1 - optim.beta1**step, "bias_correction2": 1 - optim.beta2**step}


def adafactor(
    state: Tensors, gradients: Tensors, inputs: Tensors, layout: Layout, optim: OptimSection
) -> dict[str, Tensors]:
    """Adafactor (arXiv:1804.04235, algorithms 4 to 6) with the recipe's learning rate in place of its own.

    Means and roots are those of each row of the parameter table: layers stacked in one buffer get the numbers
    that they would get by themselves, and the padding of a vocabulary, whose gradients are 0, counts nowhere.
    Weight decay is multiplied by the learning rate alone.
    """
    rate = inputs["learning_rate"]
    parts: dict[str, Tensors] = {}

    def keep(part: str, name: str, value: torch.Tensor) -> None:
        parts.setdefault(part, {})[name] = value

    for name, gradient in gradients.items():
        buffer, old = layout.buffers[name], state[f"{PARAMS}/{name}"]
        second = _second_moments(state, name, gradient, buffer, inputs["second_moment_rate"])
        for part, moment in second.items():
            keep(part, name, moment)
        update = _normalised(gradient, second, buffer)
        update = update / (_rms(update, buffer) / optim.update_clip).clamp(min=1.0)
        scale = _rms(old, buffer).clamp(min=_SCALE_EPS) if optim.scale_parameter else 1.0
        step = update * (rate * scale)
        if optim.momentum:
            old_mu = state[f"mu/{name}"]
            step = old_mu.to(step.dtype) * optim.momentum + step * (1 - optim.momentum)
            keep("mu", name, step.to(old_mu.dtype))
        keep(PARAMS, name, _decayed(old, buffer, rate, optim) - step)
    return parts


def adafactor_scalars(step: int, optim: OptimSection) -> dict[str, float]:
    """By how much the second moments of a step move to its squares: 1 - beta2 = step^-beta2_decay."""
    return {"second_moment_rate": step**-optim.beta2_decay}


OPTIMIZERS = {"adamw": Optimizer(adamw, adamw_scalars), "adafactor": Optimizer(adafactor, adafactor_scalars)}


def _second_moments(
    state: Tensors, name: str, gradient: torch.Tensor, buffer: Buffer, rate: torch.Tensor
) -> Tensors:
    """The new second moments by part: of every element, or means over the columns and over the rows."""
    squares, size = gradient.square(), buffer.rows[0].size
    if is_factored(buffer.rows[0]):
        found = {"nu_row": squares.sum(-1) / size[-1], "nu_col": squares.sum(-2) / size[-2]}
    else:
        found = {"nu": squares}
    return {
        part: state[f"{part}/{name}"] * (1 - rate) + (mean + _SQUARE_EPS) * rate
        for part, mean in found.items()
    }


def _normalised(gradient: torch.Tensor, second: Tensors, buffer: Buffer) -> torch.Tensor:
    """The gradient over the root of its second moments.

    Of a matrix, element (i, j) has row_i x col_j / mean(row). The three roots are taken one by one, because
    the product of two small moments would underflow.
    """
    if not is_factored(buffer.rows[0]):
        return gradient * second["nu"].rsqrt()
    row, column = second["nu_row"], second["nu_col"]
    mean = row.sum(-1, keepdim=True) / buffer.rows[0].size[-2]
    return gradient * (mean.sqrt() * row.rsqrt()).unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


def _rms(x: torch.Tensor, buffer: Buffer) -> torch.Tensor:
    """The root mean square of each row of the table in a buffer, its dims kept as 1."""
    dims = tuple(range(int(buffer.stacked), x.ndim))
    return (x.square().sum(dims, keepdim=True) / buffer.rows[0].num_elements).sqrt()


def _decayed(old: torch.Tensor, buffer: Buffer, rate: torch.Tensor, optim: OptimSection) -> torch.Tensor:
    return old * (1 - rate * optim.weight_decay) if buffer.decay and optim.weight_decay else old
