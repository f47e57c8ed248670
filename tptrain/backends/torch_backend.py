"""The plain-PyTorch backend: one CPU device, no mesh, no compiler. The oracle for the other one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

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
from tptrain.config.plan import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.jaxside.random_init import RandomSource
from tptrain.mesh import Spec
from tptrain.models.attention import KVCache
from tptrain.models.decoder import Decoder, LayerContext, LayerList, LayerResult


class CheckpointedLayers(LayerList):
    """Layers whose insides are computed again in the backward pass."""

    def forward(
        self, x: torch.Tensor, context: LayerContext, caches: Sequence[KVCache] | None = None
    ) -> LayerResult:
        if caches is not None:
            return super().forward(x, context, caches)
        sums: list[torch.Tensor] = []
        for layer in self:
            # The weights as they are now: by the backward pass, `functional_call` has taken them out again.
            weights: Tensors = dict(layer.named_parameters())

            def run(x: torch.Tensor, layer: nn.Module = layer, weights: Tensors = weights) -> LayerResult:
                result: LayerResult = functional_call(layer, weights, (x, context))
                return result._replace(caches=[])

            x, _, more = checkpoint(run, x, use_reentrant=False)
            sums += more
        return LayerResult(x, [], sums)


class EagerStep:
    """A step function run as it is; its new state takes the place of the old one."""

    def __init__(self, function: StepFunction):
        self._function = function
        self.trace_seconds = self.compile_seconds = 0.0

    def __call__(self, state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        return self._function(state, inputs)


class TorchBackend:
    """Every row of the parameter table as a tensor of its own on the CPU."""

    def __init__(self, plan: Plan):
        assert plan.num_devices == 1, "the torch backend runs on one device"
        self.plan = plan
        self.works_beside_host = False
        self.local_positions: tuple[int, ...] = (0,)
        self.layouts = {part.name: Layout.plain(part.rows, part.specs) for part in plan.parts.values()}
        self.layout = self.layouts[PARAMS]

    def decoder(self) -> Decoder:
        decoder = meta_decoder(self.plan)
        if self.plan.recipe.remat.policy == "full":
            assert isinstance(decoder.model.layers, LayerList)
            decoder.model.layers = CheckpointedLayers(decoder.model.layers)
        return decoder

    def place(
        self,
        source: TensorSource,
        part: str = PARAMS,
        wanted: Callable[[Buffer], bool] = every_buffer,
    ) -> Tensors:
        placed = {}
        for name, buffer in self.layouts[part].buffers.items():
            if not wanted(buffer):
                continue
            whole = tuple(slice(0, n) for n in buffer.shape)
            placed[name] = read_buffer_shards(buffer, {0: whole}, source)[0]
        return placed

    def create(self, parts: Iterable[str], source: RandomSource | None = None) -> dict[str, Tensors]:
        return {part: self._new_weights(source) if part == PARAMS else self._zeros(part) for part in parts}

    def _new_weights(self, source: RandomSource | None) -> Tensors:
        assert source is not None, "new weights need a seed"
        return self.place(source)

    def _zeros(self, part: str) -> Tensors:
        return {name: torch.zeros(b.shape, dtype=b.dtype) for name, b in self.layouts[part].buffers.items()}

    def put_batch(self, batch: Mapping[str, Any]) -> Tensors:
        return {name: torch.from_numpy(np.asarray(array)) for name, array in batch.items()}

    def put_scalars(self, values: Mapping[str, float]) -> Tensors:
        dtype = TORCH_DTYPES[self.plan.recipe.precision.master]
        return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}

    def put_constant(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def make_caches(self, rows: int, length: int, dtype: torch.dtype) -> Tensors:
        facts = self.plan.facts
        shape = (rows, length, facts.num_key_value_heads, facts.head_dim)
        names = [f"{part}.{i}" for i in range(facts.num_hidden_layers) for part in ("key", "value")]
        return {name: torch.zeros(shape, dtype=dtype) for name in names}

    def apart(self, numbers: Tensors, index: int) -> Tensors:
        return numbers

    def in_order(self, earlier: list[torch.Tensor], later: Tensors) -> tuple[list[torch.Tensor], Tensors]:
        return earlier, later

    def compile_step(
        self, function: StepFunction, state: Tensors, inputs: Tensors, specs: Mapping[str, Spec]
    ) -> EagerStep:
        return EagerStep(function)

    def fetch_shards(self, tensors: Tensors) -> dict[str, dict[int, torch.Tensor]]:
        return {name: {0: tensor.detach()} for name, tensor in tensors.items()}

    def fetch_scalars(self, outputs: Tensors) -> dict[str, float]:
        return {name: tensor.item() for name, tensor in outputs.items()}

    def fetch_rows(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor.numpy()

    def compile_count(self) -> int:
        return 0

    def sync(self) -> None:
        pass
