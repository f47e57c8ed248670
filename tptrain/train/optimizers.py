"""The optimizers: what a step does with gradients. `tptrain.config.state_parts` has what each of them keeps.

Arithmetic is in the format of the master weights. An update uses the new moments as they were computed; they
are stored, and read by the next step, in the format of their buffer. Whatever changes with the step is an
input, so that all steps are one program.

Numbers come as tensors, to each buffer its own: see `Backend.apart`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tptrain.backends.base import Buffer, Tensors
from tptrain.config.schema import OptimSection
from tptrain.config.state_parts import PARAMS, is_factored

# Adafactor's two constants (arXiv:1804.04235, section 9): added to squared gradients; the least size of a
# weight that the learning rate is multiplied by.
_SQUARE_EPS = 1e-30
_SCALE_EPS = 1e-3

# (the buffer's state by part, its clipped gradient, numbers, buffer, settings) -> its new state by part
Update = Callable[[Tensors, torch.Tensor, Tensors, Buffer, OptimSection], Tensors]


@dataclass(frozen=True)
class Optimizer:
    """update: from the clipped gradient of one buffer to its new weights and moments.

    scalars:   step (from 1) -> the numbers, besides the learning rate, that are inputs of the step.
    constants: the numbers of the formulas. `update` is given both, and the learning rate, as tensors.
    """

    update: Update
    scalars: Callable[[int, OptimSection], dict[str, float]]
    constants: Callable[[OptimSection], dict[str, float]]


def adamw(
    state: Tensors, gradient: torch.Tensor, numbers: Tensors, buffer: Buffer, optim: OptimSection
) -> Tensors:
    """AdamW (arXiv:1711.05101) in the arithmetic of torch.optim.AdamW.

    Elementwise over buffers, so it does not matter how a backend splits or stacks them.
    """
    old_mu, old_nu = state["mu"].to(gradient.dtype), state["nu"].to(gradient.dtype)
    mu = old_mu * numbers["beta1"] + gradient * numbers["rest1"]
    nu = old_nu * numbers["beta2"] + gradient.square() * numbers["rest2"]
    root = nu.sqrt() / numbers["bias_correction2"].sqrt() + numbers["eps"]
    step = (mu / numbers["bias_correction1"]) / root
    new = _decayed(state[PARAMS], buffer, numbers, optim) - numbers["learning_rate"] * step
    return {PARAMS: new, "mu": mu.to(state["mu"].dtype), "nu": nu.to(state["nu"].dtype)}


def adamw_constants(optim: OptimSection) -> dict[str, float]:
    betas = {"beta1": optim.beta1, "rest1": 1 - optim.beta1, "beta2": optim.beta2, "rest2": 1 - optim.beta2}
    return {**betas, "eps": optim.eps, **_decay(optim)}


def adamw_scalars(step: int, optim: OptimSection) -> dict[str, float]:
    """1 - beta^step of Adam (arXiv:1412.6980, algorithm 1)."""
    return {"bias_correction1": 1 - optim.beta1**step, "bias_correction2": 1 - optim.beta2**step}


def adafactor(
    state: Tensors, gradient: torch.Tensor, numbers: Tensors, buffer: Buffer, optim: OptimSection
) -> Tensors:
    """Adafactor (arXiv:1804.04235, algorithms 4 to 6) with the recipe's learning rate in place of its own.

    Means and roots are those of each row of the parameter table: layers stacked in one buffer get the numbers
    that they would get by themselves, and the padding of a vocabulary, whose gradients are 0, counts nowhere.
    Weight decay is multiplied by the learning rate alone.
    """
    rate, old = numbers["learning_rate"], state[PARAMS]
    new = _second_moments(state, gradient, buffer, numbers["second_moment_rate"])
    update = _normalised(gradient, new, buffer)
    update = update / (_rms(update, buffer) / optim.update_clip).clamp(min=1.0)
    scale = _rms(old, buffer).clamp(min=_SCALE_EPS) if optim.scale_parameter else 1.0
    step = update * (rate * scale)
    if optim.momentum:
        step = state["mu"].to(step.dtype) * optim.momentum + step * (1 - optim.momentum)
        new["mu"] = step.to(state["mu"].dtype)
    return {**new, PARAMS: _decayed(old, buffer, numbers, optim) - step}


def adafactor_scalars(step: int, optim: OptimSection) -> dict[str, float]:
    """By how much the second moments of a step move to its squares: 1 - beta2 = step^-beta2_decay."""
    return {"second_moment_rate": step**-optim.beta2_decay}


def _decay(optim: OptimSection) -> dict[str, float]:
    return {"weight_decay": optim.weight_decay} if optim.weight_decay else {}


OPTIMIZERS = {
    "adamw": Optimizer(adamw, adamw_scalars, adamw_constants),
    "adafactor": Optimizer(adafactor, adafactor_scalars, _decay),
}


def _second_moments(state: Tensors, gradient: torch.Tensor, buffer: Buffer, rate: torch.Tensor) -> Tensors:
    """The new second moments by part: of every element, or means over the columns and over the rows."""
    squares, size = gradient.square(), buffer.rows[0].size
    if is_factored(buffer.rows[0]):
        found = {"nu_row": squares.sum(-1) / size[-1], "nu_col": squares.sum(-2) / size[-2]}
    else:
        found = {"nu": squares}
    return {part: state[part] * (1 - rate) + (mean + _SQUARE_EPS) * rate for part, mean in found.items()}


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


def _decayed(old: torch.Tensor, buffer: Buffer, numbers: Tensors, optim: OptimSection) -> torch.Tensor:
    if not (buffer.decay and optim.weight_decay):
        return old
    return old * (1 - numbers["learning_rate"] * numbers["weight_decay"])
