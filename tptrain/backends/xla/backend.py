"""The backend that runs a plan on torch_xla's devices."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from tptrain.backends.base import (
    TORCH_DTYPES,
    Buffer,
    Layout,
    StepFunction,
    Tensors,
    TensorSource,
    every_buffer,
    meta_decoder,
)
from tptrain.backends.shards import read_buffer_shards
from tptrain.backends.xla.capture import CapturedStep, compile_count
from tptrain.backends.xla.experts import ExpertsKernel
from tptrain.backends.xla.jax_call import traced_call
from tptrain.backends.xla.passes import apply_passes
from tptrain.backends.xla.sharding import DeviceMesh
from tptrain.backends.xla.splash import SplashKernel
from tptrain.config.compiler_flags import cuts_products_up
from tptrain.config.plan import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.jaxside.random_init import RandomSource, keys_of, new_weights_hlo
from tptrain.mesh import Spec, shard_slices, spec_of
from tptrain.models.decoder import Decoder
from tptrain.weights.read_ahead import read_ahead

_BATCH_DIMS = ("act_batch", "act_tokens")
_CACHE_DIMS = ("act_batch", "act_keys", "act_kv_heads", "act_head_dim")


class XlaBackend:
    """Buffers split over the mesh, layers stacked for a scan, functions captured and replayed.

    order: runtime ordinals of the devices in mesh order.
    """

    def __init__(self, plan: Plan, order: tuple[int, ...]):
        self.plan = plan
        self.works_beside_host = xr.device_type() != "CPU"
        self.mesh = DeviceMesh(plan.mesh, order)
        self.local_positions = self.mesh.local_positions
        parts = plan.parts.values()
        self.layouts = {part.name: Layout.stacked(part.rows, part.specs, plan.layer_runs) for part in parts}
        self.layout = self.layouts[PARAMS]

    def decoder(self) -> Decoder:
        decoder = meta_decoder(self.plan)
        plan, splash = self.plan, None
        if plan.splash is not None:
            splash = SplashKernel(self.mesh, plan.rules.acts, plan.splash)
        apply_passes(
            decoder,
            plan.layer_runs,
            self.layout,
            self.mesh,
            plan.rules,
            plan.recipe.remat.policy,
            plan.offloaded,
            splash,
            ExpertsKernel(self.mesh, plan.rules) if plan.experts == "grouped" else None,
            products_are_cut_up=cuts_products_up(plan.tpu_flags),
        )
        return decoder

    def place(
        self,
        source: TensorSource,
        part: str = PARAMS,
        wanted: Callable[[Buffer], bool] = every_buffer,
    ) -> Tensors:
        buffers = filter(wanted, self.layouts[part].buffers.values())
        with closing(read_ahead(self._pieces(source, buffers), 1)) as ahead:
            return {b.name: self.mesh.place(shards, b.shape, b.spec) for b, shards in ahead}

    def _pieces(
        self, source: TensorSource, buffers: Iterable[Buffer]
    ) -> Generator[tuple[Buffer, dict[int, torch.Tensor]]]:
        """Each buffer with the pieces of this process's devices, on the host."""
        for buffer in buffers:
            slices = shard_slices(buffer.rows[0].padded_size, buffer.row_spec, self.mesh.axis_sizes)
            mine = {position: slices[position] for position in self.local_positions}
            yield buffer, read_buffer_shards(buffer, mine, source)

    def create(self, parts: Iterable[str], source: RandomSource | None = None) -> dict[str, Tensors]:
        traced = {part: self._new_weights(source) if part == PARAMS else self._zeros(part) for part in parts}
        torch_xla.sync()
        return traced

    def _new_weights(self, source: RandomSource | None) -> Tensors:
        """Traced: JAX's program for whole buffers, and how they are split; XLA derives the rest."""
        assert source is not None, "new weights need a seed"
        buffers = self.layout.buffers.values()
        rows = tuple((buffer.rows, buffer.stacked) for buffer in buffers)
        keys = self.put_constant(torch.from_numpy(keys_of(rows, source.seed)))
        made = traced_call("new_weights", new_weights_hlo(rows, source.initializer_range))([keys])
        return {b.name: self.mesh.mark(x.to(b.dtype), b.spec) for b, x in zip(buffers, made, strict=True)}

    def _zeros(self, part: str) -> Tensors:
        """Traced."""
        device = torch_xla.device()
        return {
            name: self.mesh.mark(torch.zeros(b.shape, dtype=b.dtype, device=device), b.spec)
            for name, b in self.layouts[part].buffers.items()
        }

    def _zero(self, shape: tuple[int, ...], spec: Spec, dtype: torch.dtype) -> torch.Tensor:
        slices = shard_slices(shape, spec, self.mesh.axis_sizes)
        piece = torch.zeros([s.stop - s.start for s in slices[0]], dtype=dtype)
        return self.mesh.place(dict.fromkeys(self.mesh.local_positions, piece), shape, spec)

    def put_batch(self, batch: Mapping[str, Any]) -> Tensors:
        return {name: self._put_rows(torch.from_numpy(np.asarray(a))) for name, a in batch.items()}

    def _put_rows(self, array: torch.Tensor) -> torch.Tensor:
        leading = ((),) * (array.ndim - len(_BATCH_DIMS))
        return self._put(array, (*leading, *spec_of(_BATCH_DIMS, self.plan.rules.acts)))

    def put_scalars(self, values: Mapping[str, float]) -> Tensors:
        dtype = TORCH_DTYPES[self.plan.recipe.precision.master]
        return {name: self.put_constant(torch.tensor(value, dtype=dtype)) for name, value in values.items()}

    def put_constant(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._put(tensor, ((),) * tensor.ndim)

    def _put(self, full: torch.Tensor, spec: Spec) -> torch.Tensor:
        return self.mesh.place_full(full, spec)

    def make_caches(self, rows: int, length: int, dtype: torch.dtype) -> Tensors:
        """Empty key and value caches: of each run and position in its period, [turns, rows, length, K, H]."""
        facts, runs = self.plan.facts, self.plan.layer_runs
        spec = ((), *spec_of(_CACHE_DIMS, self.plan.rules.acts))
        shape = (rows, length, facts.num_key_value_heads, facts.head_dim)
        turns = [run.turns for run in runs.runs for _ in range(run.period)]
        return {
            f"{part}.{i}": self._zero((count, *shape), spec, dtype)
            for i, count in enumerate(turns)
            for part in ("key", "value")
        }

    def apart(self, numbers: Tensors, index: int) -> Tensors:
        # A barrier around the numbers and one that no other buffer has: XLA joins only equal instructions.
        own = [tensor.clone() for tensor in numbers.values()]
        mark = torch.full_like(next(iter(numbers.values())), float(index))
        xm.optimization_barrier_([*own, mark])
        return dict(zip(numbers, own, strict=True))

    def in_order(self, earlier: list[torch.Tensor], later: Tensors) -> tuple[list[torch.Tensor], Tensors]:
        # The barrier acts in place, and what has passed it depends on all that enters it.
        passed = [tensor.clone() for tensor in (*earlier, *later.values())]
        xm.optimization_barrier_(passed)
        return passed[: len(earlier)], dict(zip(later, passed[len(earlier) :], strict=True))

    def compile_step(
        self, function: StepFunction, state: Tensors, inputs: Tensors, specs: Mapping[str, Spec]
    ) -> CapturedStep:
        def mark_state(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return self.mesh.mark(tensor, specs[name])

        return CapturedStep(function, state, inputs, mark_state)

    def fetch_shards(self, tensors: Tensors) -> dict[str, dict[int, torch.Tensor]]:
        return dict(zip(tensors, self.mesh.fetch(list(tensors.values())), strict=True))

    def fetch_scalars(self, outputs: Tensors) -> dict[str, float]:
        # Unlike a look at the shards, this waits for these tensors and not for steps started later.
        fetched = torch_xla._XLAC._xla_get_cpu_tensors(list(outputs.values()))
        return {name: tensor.item() for name, tensor in zip(outputs, fetched, strict=True)}

    def fetch_rows(self, tensor: torch.Tensor) -> np.ndarray:
        return self.mesh.gather(tensor).numpy()

    def compile_count(self) -> int:
        return compile_count()

    def sync(self) -> None:
        torch_xla.sync()
        xm.wait_device_ops()
