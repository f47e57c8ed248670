"""The training state: one flat dict of tensors, `<part>/<buffer>` for the parts of the plan, plus a flag."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tptrain.backends.base import Backend, Layout, Tensors, TensorSource
from tptrain.config.state_parts import PARAMS
from tptrain.jaxside.random_init import RandomSource
from tptrain.mesh import Spec

# 1 once a guard has stopped the run; from then on no update is applied.
HALTED = "halted"


def part_of(state: Tensors, part: str) -> Tensors:
    """The tensors of one part, by buffer name."""
    prefix = f"{part}/"
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def parts_of(state: Tensors) -> dict[str, Tensors]:
    """All parts of a state by their names: what a checkpoint holds of it."""
    names = dict.fromkeys(name.partition("/")[0] for name in state if "/" in name)
    return {part: part_of(state, part) for part in names}


def join_parts(parts: Mapping[str, Tensors], halted: torch.Tensor) -> Tensors:
    """The inverse of `parts_of`."""
    state = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    return {**state, HALTED: halted}


def split_frozen(state: Tensors, layout: Layout) -> tuple[Tensors, Tensors]:
    """The state that steps change, and the frozen weights, which are inputs of the step.

    layout: that of the weights. Both keep their names, so the two together are the state again.
    """
    frozen = {f"{PARAMS}/{name}" for name, buffer in layout.buffers.items() if not buffer.trainable}
    moving = {name: tensor for name, tensor in state.items() if name not in frozen}
    return moving, {name: tensor for name, tensor in state.items() if name in frozen}


def joined_weights(backend: Backend, base: Tensors, adapters: Tensors) -> Tensors:
    """All weights in the order of their buffers, from those of the model and those of its adapters."""
    both = {**base, **adapters}
    return {name: both[name] for name in backend.layout.buffers}


def fresh_state(backend: Backend, source: TensorSource) -> Tensors:
    """Weights read from `source`, or made by the devices where they are new; everything else zero."""
    if isinstance(source, RandomSource):
        return join_parts(backend.create(backend.layouts, source), not_halted(backend))
    return begun_state(backend, backend.place(source))


def begun_state(backend: Backend, params: Tensors) -> Tensors:
    """The state of a run that begins with these weights."""
    beside = backend.create(part for part in backend.layouts if part != PARAMS)
    return join_parts({PARAMS: params, **beside}, not_halted(backend))


def not_halted(backend: Backend) -> torch.Tensor:
    return backend.put_constant(torch.zeros((), dtype=torch.int32))


def state_specs(backend: Backend) -> dict[str, Spec]:
    """How each tensor of the state is split."""
    specs = {
        f"{part}/{name}": buffer.spec
        for part, layout in backend.layouts.items()
        for name, buffer in layout.buffers.items()
    }
    return {**specs, HALTED: ()}
