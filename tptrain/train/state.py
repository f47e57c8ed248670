"""The training state: one flat dict of tensors, `<part>/<buffer>`, plus a flag."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tptrain.backends.base import Backend, Tensors, TensorSource
from tptrain.mesh import Spec

# The weights, and Adam's first and second moment of their gradients.
PARTS = ("params", "mu", "nu")
# 1 once a loss or gradient was not finite; from then on no update is applied.
HALTED = "halted"


def part_of(state: Tensors, part: str) -> Tensors:
    """The tensors of one part, by buffer name."""
    prefix = f"{part}/"
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def join_parts(parts: Mapping[str, Tensors], halted: torch.Tensor) -> Tensors:
    """The inverse of `part_of`, for all parts together."""
    state = {f"{part}/{name}": tensor for part in PARTS for name, tensor in parts[part].items()}
    return {**state, HALTED: halted}


def fresh_state(backend: Backend, source: TensorSource) -> Tensors:
    """Weights read from `source`, Adam's moments zero."""
    parts = {"params": backend.place(source), "mu": backend.zeros(), "nu": backend.zeros()}
    return join_parts(parts, not_halted(backend))


def not_halted(backend: Backend) -> torch.Tensor:
    return backend.put_constant(torch.zeros((), dtype=torch.int32))


def state_specs(backend: Backend) -> dict[str, Spec]:
    """How each tensor of the state is split."""
    specs = {f"{p}/{name}": buffer.spec for p in PARTS for name, buffer in backend.layout.buffers.items()}
    return {**specs, HALTED: ()}
