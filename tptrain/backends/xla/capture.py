"""A pure step, traced and compiled once and then replayed.

Tracing a training step costs tens to hundreds of milliseconds of Python; running the compiled graph again
costs about one. So the step is traced a single time, its graph compiled under its hash, and every step after
that hands new buffers to the same executable. Nothing can be traced again by accident: a call with another
shape is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch_xla
from torch_xla.debug import metrics
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from tptrain.backends.base import StepFunction, Tensors
from tptrain.errors import TptrainError

_XLAC = torch_xla._XLAC


class CaptureError(TptrainError):
    """The step is not the pure function of its arguments that it has to be."""


def compile_count() -> int:
    """Programs compiled by this process so far."""
    data = metrics.metric_data("CompileTime")
    return int(data[0]) if data else 0


@dataclass(frozen=True)
class Trace:
    """A step as a graph that has not run.

    results:      the new state, in the order of the state, then the outputs.
    arguments:    the graph's parameters in order: the name of an argument, or the tensor of a lifted number.
    constants:    those numbers. output_names: of the outputs.
    """

    results: list[torch.Tensor]
    arguments: list[str | torch.Tensor]
    constants: tuple[float, ...]
    output_names: tuple[str, ...]


def trace(
    function: StepFunction,
    state: Tensors,
    inputs: Tensors,
    mark_state: Callable[[str, torch.Tensor], torch.Tensor],
) -> Trace:
    """Run the Python of a step on its arguments, which builds its graph.

    mark_state: states the sharding of a new state tensor, so that it can be the next step's argument.
    Raises CaptureError when the step is no pure function of its arguments.
    """
    new_state, outputs = function(state, inputs)
    if set(new_state) != set(state):
        raise CaptureError(f"the step changes the names of its state: {sorted(set(new_state) ^ set(state))}")
    results = [mark_state(name, new_state[name]) for name in state] + list(outputs.values())
    arguments, constants = _match_arguments(results, {**state, **inputs})
    return Trace(results, arguments, constants, tuple(outputs))


class CapturedStep:
    """A compiled `(state, inputs) -> (state, outputs)`; `state` is donated on every call.

    trace_seconds, compile_seconds: what the capture took.
    constants: numbers of the model's own formulas (such as an epsilon) that the trace lifted to arguments.
    """

    def __init__(
        self,
        function: StepFunction,
        state: Tensors,
        inputs: Tensors,
        mark_state: Callable[[str, torch.Tensor], torch.Tensor],
    ):
        """Trace and compile on example arguments, which stay valid. mark_state: see `trace`."""
        torch_xla.sync()  # whatever was pending must not become part of the step
        self._state_names, self._input_names = tuple(state), tuple(inputs)
        self._signature = _signature(state, inputs)
        for tensor in state.values():
            _XLAC._set_buffer_donation(tensor, True)
        for tensor in inputs.values():
            _XLAC._set_buffer_donation(tensor, False)
        started = time.perf_counter()
        traced = trace(function, state, inputs, mark_state)
        self._arguments, self.constants = traced.arguments, traced.constants
        self._output_names = traced.output_names
        self.trace_seconds = time.perf_counter() - started
        started = time.perf_counter()
        with alias_with_buffer_donor_config():
            self._hash = _XLAC._get_graph_hash(traced.results)
            _XLAC._xla_warm_up_cache(traced.results, [])
        self.compile_seconds = time.perf_counter() - started
        _XLAC._clear_pending_irs(str(torch_xla.device()))

    def __call__(self, state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """Run the compiled step; the tensors of `state` are dead afterwards."""
        self._check(state, inputs)
        given = {**state, **inputs}
        arguments = [given[a] if isinstance(a, str) else a for a in self._arguments]
        results = _XLAC._run_cached_graph(self._hash, arguments)
        count = len(self._state_names)
        new_state = dict(zip(self._state_names, results[:count], strict=True))
        return new_state, dict(zip(self._output_names, results[count:], strict=True))

    def _check(self, state: Tensors, inputs: Tensors) -> None:
        signature = _signature(state, inputs)
        if signature == self._signature:
            return
        for name in sorted(set(signature) | set(self._signature)):
            given, compiled = signature.get(name, "missing"), self._signature.get(name, "not an argument")
            if given != compiled:
                raise CaptureError(
                    f"argument {name!r} changed: compiled for {compiled}, given {given}; a step has one graph"
                )


def _signature(state: Tensors, inputs: Tensors) -> dict[str, str]:
    """Name -> shape and dtype of every argument."""
    return {name: f"{list(t.shape)} {t.dtype}" for name, t in {**state, **inputs}.items()}


def _match_arguments(
    results: Sequence[torch.Tensor], named: Mapping[str, torch.Tensor]
) -> tuple[list[str | torch.Tensor], tuple[float, ...]]:
    """The graph's parameters in order: the name of an argument, or the tensor of a lifted number.

    Matching goes by data handle: by tensor id, arguments that the trace has wrapped anew stay unmatched,
    become constants, and the loss freezes without an error.
    """
    _, leaves = _XLAC._get_tensors_xla_device_data_node(list(results))
    names = dict(zip(_XLAC._get_tensors_handle(list(named.values())), named, strict=True))
    arguments: list[str | torch.Tensor] = []
    constants = []
    for handle, leaf in zip(_XLAC._get_tensors_handle(leaves), leaves, strict=True):
        if handle in names:
            arguments.append(names[handle])
        elif leaf.ndim == 0:
            arguments.append(leaf)
            constants.append(leaf.item())
        else:
            shape = f"{list(leaf.shape)} {leaf.dtype}"
            raise CaptureError(f"the step reads a tensor that is not among its arguments: {shape}")
    unused = sorted(set(named) - {a for a in arguments if isinstance(a, str)})
    if unused:
        raise CaptureError(f"the step does not read its arguments {', '.join(unused)}")
    return arguments, tuple(constants)
