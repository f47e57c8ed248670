"""The XLA backend without data: the train step traced as a run traces it, for any number of devices.

Every argument is a placeholder of torch_xla: a shape that holds no memory. What is traced is the program of
a run on such devices; what a run states on the data (how its parameters are split, which of them the step
may write over) is added to the module afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch_xla.core import xla_builder

from tptrain.backends.base import (
    Buffer,
    StepFunction,
    Tensors,
    TensorSource,
    TracedStep,
    every_buffer,
)
from tptrain.backends.xla.backend import XlaBackend
from tptrain.backends.xla.capture import trace
from tptrain.backends.xla.hlo_proto import (
    annotate,
    custom_shardings,
    instruction_count,
    parameter_shardings,
)
from tptrain.backends.xla.sharding import partition_spec
from tptrain.config.plan import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.family import ParamRow
from tptrain.jaxside.random_init import RandomSource
from tptrain.mesh import Spec

_XLAC = torch_xla._XLAC


def count_devices_as(count: int) -> None:
    """Have torch_xla's meshes take this process for one of `count` devices; those beyond it stay unused."""
    runtime: Any = xr
    if runtime.global_runtime_device_count() > count:
        runtime.global_runtime_device_count = lambda: count


class NoSource:
    """The TensorSource of buffers without data: it is never read."""

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        raise AssertionError(f"{row.name}: placeholders have no values")


class PlaceholderBackend(XlaBackend):
    """Devices in mesh order, and placeholders wherever a run has buffers."""

    no_source = NoSource()

    def __init__(self, plan: Plan):
        super().__init__(plan, tuple(range(plan.num_devices)))
        self._spec_of: dict[int, Spec] = {}

    def place(
        self,
        source: TensorSource,
        part: str = PARAMS,
        wanted: Callable[[Buffer], bool] = every_buffer,
    ) -> Tensors:
        buffers = filter(wanted, self.layouts[part].buffers.values())
        return {b.name: self._placeholder(b.shape, b.spec, b.dtype) for b in buffers}

    def create(self, parts: Iterable[str], source: RandomSource | None = None) -> dict[str, Tensors]:
        return {part: self.place(self.no_source, part) for part in parts}

    def _zero(self, shape: tuple[int, ...], spec: Spec, dtype: torch.dtype) -> torch.Tensor:
        return self._placeholder(shape, spec, dtype)

    def _put(self, full: torch.Tensor, spec: Spec) -> torch.Tensor:
        return self._placeholder(tuple(full.shape), spec, full.dtype)

    def _placeholder(self, shape: tuple[int, ...], spec: Spec, dtype: torch.dtype) -> torch.Tensor:
        tensor: torch.Tensor = xla_builder.create_placeholder_tensor(shape, dtype)
        self._spec_of[_handle(tensor)] = spec
        return tensor

    def trace_step(
        self, function: StepFunction, state: Tensors, inputs: Tensors, specs: Mapping[str, Spec]
    ) -> TracedStep:
        """Trace `function` as `compile_step` does; nothing is compiled or run."""
        started = time.perf_counter()
        traced = trace(function, state, inputs, lambda name, tensor: self.mesh.mark(tensor, specs[name]))
        names = tuple(a if isinstance(a, str) else None for a in traced.arguments)
        proto = _XLAC._get_xla_tensors_hlo_proto(traced.results)
        given = {**state, **inputs}
        stated = {name: self._spec_of[_handle(tensor)] for name, tensor in given.items()}
        shardings = self._shardings(set(stated.values()))
        by_number = {i: shardings[stated[name]] for i, name in enumerate(names) if name is not None}
        donors = [i for i, name in enumerate(names) if name in state]
        module = annotate(proto, by_number if self.plan.num_devices > 1 else {}, donors)
        _XLAC._clear_pending_irs(str(torch_xla.device()))
        seconds = time.perf_counter() - started
        outputs = (*state, *traced.output_names)
        return TracedStep(module, names, outputs, frozenset(state), stated, seconds)

    def changed_specs(self, step: TracedStep) -> tuple[str, ...]:
        """State that the step returns in another sharding than it takes it in, as XLA is told."""
        taken = dict(zip(step.parameters, parameter_shardings(step.module), strict=True))
        returned = dict(zip(step.outputs, custom_shardings(step.module), strict=True))
        return tuple(name for name in sorted(step.donated) if taken[name] != returned[name])

    def count_instructions(self, step: TracedStep) -> int:
        return instruction_count(step.module)

    def _shardings(self, specs: set[Spec]) -> dict[Spec, bytes]:
        """Each spec as torch_xla writes it for XLA: read back from a module that states nothing else."""
        ordered = sorted(specs)
        marked = []
        for spec in ordered:
            tensor = xla_builder.create_placeholder_tensor(
                (self.plan.num_devices,) * len(spec), torch.float32
            )
            xs.annotate_custom_sharding(tensor, self.mesh.xla, partition_spec(spec))
            marked.append(tensor)
        written = custom_shardings(_XLAC._get_xla_tensors_hlo_proto(marked))
        return dict(zip(ordered, written, strict=True))


def _handle(tensor: torch.Tensor) -> int:
    (handle,) = _XLAC._get_tensors_handle([tensor])
    return int(handle)
