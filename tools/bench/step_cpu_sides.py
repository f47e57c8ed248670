"""The sides that tools/bench/step_cpu.py compares; importing this opens the devices."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tools.bench.jax_step import ROWS, make_step
from tptrain.backends.base import Backend, Tensors
from tptrain.backends.make import make_backend
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config import (
    DataSection,
    MeshSection,
    ModelSection,
    Plan,
    PrecisionSection,
    Recipe,
    ScheduleSection,
)
from tptrain.config.planning import plan_recipe
from tptrain.jaxside.random_init import RandomSource
from tptrain.mesh import AXES
from tptrain.train.schedule import step_scalars
from tptrain.train.state import fresh_state, state_specs
from tptrain.train.step import make_train_step

DEVICES, FSDP, TENSOR = 8, 4, 2
STEPS = 1000  # of the schedule; a run makes fewer


def bench_plan(backend: str, layers: int, width: int, rows: int, tokens: int) -> Plan:
    """A Llama in float32, which a CPU multiplies best; on one device for the torch backend."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8 * width,
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
        "max_position_embeddings": tokens,
        "tie_word_embeddings": False,
    }
    split = backend == "xla"
    recipe = Recipe(
        name="step_cpu",
        topology=f"cpu-{DEVICES}" if split else "cpu-1",
        backend=backend,  # type: ignore[arg-type]
        model=ModelSection(config=config, tokenizer="train"),
        data=DataSection(path="train.jsonl", seq_len=tokens, batch_rows=rows),
        mesh=MeshSection(fsdp=FSDP, tensor=TENSOR) if split else MeshSection(),
        schedule=ScheduleSection(max_steps=STEPS, warmup_steps=10),
        precision=PrecisionSection(compute="float32"),
    )
    return plan_recipe(recipe, environ={})


def batch(plan: Plan, step: int) -> dict[str, np.ndarray]:
    """Full rows of random tokens, [1, rows, tokens]; of one in eight tokens the loss is not asked."""
    shape = (1, plan.recipe.data.batch_rows, plan.recipe.data.seq_len)
    random = np.random.default_rng(step)
    tokens = random.integers(0, plan.facts.vocab_size, shape, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=-1),
        "weights": (random.random(shape) < 7 / 8).astype(np.float32),
        "positions": np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape).copy(),
        "segment_ids": np.ones(shape, np.int32),
    }


def scalars(plan: Plan, step: int) -> dict[str, float]:
    return step_scalars(step, STEPS, plan.recipe.schedule, plan.recipe.optim)


def source(plan: Plan) -> RandomSource:
    return RandomSource(plan.recipe.seed, plan.facts.initializer_range)


def our_side(layers: int, width: int, rows: int, tokens: int) -> OurSide:
    """Captured and replayed on the mesh."""
    plan = bench_plan("xla", layers, width, rows, tokens)
    return OurSide(plan, make_backend(plan))


def eager_side(layers: int, width: int, rows: int, tokens: int) -> OurSide:
    """Plain torch eager on one device."""
    plan = bench_plan("torch", layers, width, rows, tokens)
    return OurSide(plan, TorchBackend(plan))


@dataclass(frozen=True)
class Taken:
    """One step: seconds from its call, its inputs at hand, to its loss; processor seconds in them."""

    seconds: float
    cpu_seconds: float
    loss: float


class Clock:
    """Started when it is made."""

    def __init__(self) -> None:
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def taken(self, loss: float) -> Taken:
        return Taken(self.seconds, time.process_time() - self._cpu_began, loss)


class OurSide:
    """tptrain's step on either backend.

    host_seconds: per step, from the call of the captured step to its return.
    compiles:     programs that XLA compiled from the capture on.
    """

    def __init__(self, plan: Plan, backend: Backend):
        self.plan, self.backend = plan, backend
        decoder = self.backend.decoder()
        self._constants = {name: self.backend.put_constant(t) for name, t in decoder.constants().items()}
        self._state = fresh_state(self.backend, source(plan))
        self._step = 0
        self.host_seconds: list[float] = []
        self._compiles_before = self.backend.compile_count()
        function = make_train_step(decoder, self.backend.layout, plan.recipe)
        specs = state_specs(self.backend)
        self._function = self.backend.compile_step(function, self._state, self._inputs(), specs)

    @property
    def compiles(self) -> int:
        return self.backend.compile_count() - self._compiles_before

    @property
    def trace_seconds(self) -> float:
        return self._function.trace_seconds

    def _inputs(self) -> Tensors:
        put = self.backend.put_batch(batch(self.plan, self._step))
        return {**put, **self.backend.put_scalars(scalars(self.plan, self._step + 1)), **self._constants}

    def step(self) -> Taken:
        inputs = self._inputs()
        self.backend.sync()
        clock = Clock()
        self._state, outputs = self._function(self._state, inputs)
        self.host_seconds.append(clock.seconds)
        taken = clock.taken(self.backend.fetch_scalars(outputs)["loss"])
        self._step += 1
        return taken


class JaxSide:
    """The hand-written step on the same mesh, from the same weights."""

    def __init__(self, ours: OurSide):
        self.plan = plan = ours.plan
        sizes = [plan.mesh.axis_sizes[axis] for axis in AXES]
        devices = np.array(jax.devices("cpu")[: plan.num_devices]).reshape(sizes)
        self._mesh = Mesh(devices, AXES)
        buffers = ours.backend.layout.buffers
        specs = {name: P(*(axes or None for axes in buffer.spec)) for name, buffer in buffers.items()}
        decays = {name: buffer.decay for name, buffer in buffers.items()}
        self._function = make_step(plan.facts, plan.recipe.optim, self._mesh, specs, decays)
        self._state: dict[str, Any] = {part: {} for part in plan.parts}
        for name, buffer in buffers.items():
            whole = [source(plan).read(row, tuple(slice(0, n) for n in row.size)) for row in buffer.rows]
            array = (torch.stack(whole) if buffer.stacked else whole[0]).float().numpy()
            sharding = NamedSharding(self._mesh, specs[name])
            for part in plan.parts:
                values = array if part == "params" else np.zeros_like(array)
                self._state[part][name] = jax.device_put(values, sharding)
        self._step = 0

    def step(self) -> Taken:
        rows = NamedSharding(self._mesh, ROWS)
        inputs = {n: jax.device_put(a[0], rows) for n, a in batch(self.plan, self._step).items()}
        inputs |= {n: jax.numpy.float32(value) for n, value in scalars(self.plan, self._step + 1).items()}
        jax.block_until_ready(inputs)
        clock = Clock()
        self._state, outputs = self._function(self._state, inputs)
        taken = clock.taken(outputs["loss"].item())
        self._step += 1
        return taken
