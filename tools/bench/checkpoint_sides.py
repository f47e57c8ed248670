"""The sides that tools/bench/checkpoint.py compares; importing this opens the devices."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tptrain.backends.make import make_backend
from tptrain.ckpt.bridge import live_arrays
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.ckpt.digests import MANIFEST, digest_chunk
from tptrain.ckpt.policies import KeepLast
from tptrain.config import (
    DataSection,
    MeshSection,
    ModelSection,
    PrecisionSection,
    Recipe,
    ScheduleSection,
)
from tptrain.config.planning import plan_recipe
from tptrain.config.state_parts import PARAMS
from tptrain.jaxside.random_init import RandomSource

DEVICES = 8


def bench_plan(gb: float) -> Any:
    """A Llama whose weights and moments together take about `gb` GB, on 4x2 devices."""
    width, mlp, vocab = 1024, 2816, 8191
    per_layer = 2 * width * width + 2 * width * 512 + 3 * width * mlp
    layers = max(round((gb * 1e9 / 12 - 2 * vocab * width) / per_layer), 1)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    recipe = Recipe(
        name="bench",
        topology=f"cpu-{DEVICES}",
        model=ModelSection(config=config, tokenizer="train"),
        data=DataSection(path="train.jsonl", seq_len=128, batch_rows=8),
        mesh=MeshSection(fsdp=4, tensor=2),
        schedule=ScheduleSection(max_steps=10),
        precision=PrecisionSection(compute="float32"),
    )
    return plan_recipe(recipe, environ={})


class OurSide:
    """A state on the devices and tptrain's checkpoints of it."""

    def __init__(self, folder: Path, gb: float):
        self.plan, self.folder = bench_plan(gb), folder
        self.backend = make_backend(self.plan)
        self.parts = {
            part: self.backend.create([PARAMS], RandomSource(seed, 0.02))[PARAMS]
            for seed, part in enumerate(self.plan.parts)
        }
        self.backend.sync()
        self._checkpointer = Checkpointer(self.plan, self.backend, folder, keep=[KeepLast(100)], say=_fail)
        self.copy_seconds = 0.0
        self.num_bytes = sum(t.nbytes for tensors in self.parts.values() for t in tensors.values())
        self.num_arrays = sum(len(part.rows) for part in self.plan.parts.values())
        self.mesh = "x".join(str(n) for n in self.plan.mesh.axis_sizes.values() if n > 1)

    def copy(self) -> None:
        """The yardstick: every shard of every tensor to the host, as the runtime does it."""
        import torch_xla

        tensors = [t for buffers in self.parts.values() for t in buffers.values()]
        torch_xla._XLAC._get_local_shards(tensors)

    def save(self, step: int) -> None:
        snapshot = self._checkpointer._snapshot
        if snapshot is not None:
            take = snapshot.take

            def timed_take(parts: Any) -> None:
                started = time.perf_counter()
                take(parts)
                self.copy_seconds = time.perf_counter() - started
                snapshot.take = take  # type: ignore[method-assign]

            snapshot.take = timed_take  # type: ignore[method-assign]
        self._checkpointer.save(step, self.parts, {"step": step})

    def wait(self) -> None:
        self._checkpointer.wait()

    def digest(self) -> None:
        """The digests of a save alone, from memory."""
        snapshot = self._checkpointer._snapshot
        assert snapshot is not None
        for arrays in snapshot.arrays.values():
            for array in arrays.values():
                for _, values in array.pieces():
                    digest_chunk(values, values.shape)

    def restore(self, step: int, verify: bool) -> None:
        manifest = self.folder / str(step) / MANIFEST
        hidden = manifest.with_suffix(".hidden")
        if not verify:
            os.rename(manifest, hidden)
        restored = self._checkpointer.restore(
            step, tuple(self.plan.parts), lambda run: None, unverified=not verify
        )
        self.backend.sync()
        assert set(restored.parts) == set(self.plan.parts)
        if not verify:
            os.rename(hidden, manifest)

    def forget(self, step: int) -> None:
        shutil.rmtree(self.folder / str(step))


class JaxSide:
    """The same arrays as jax.Arrays with the same shardings, saved by Orbax as its documentation has it."""

    def __init__(self, folder: Path, ours: OurSide):
        import orbax.checkpoint as ocp

        self._folder = folder
        self._tree = {
            part: live_arrays(ours.plan, ours.backend, buffers) for part, buffers in ours.parts.items()
        }
        self._sync = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        self._async = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._args = ocp.args

    def save_sync(self, step: int) -> None:
        self._sync.save(self._folder / f"sync-{step}", args=self._args.StandardSave(self._tree))
        shutil.rmtree(self._folder / f"sync-{step}")

    def save_async(self, step: int) -> None:
        self._async.save(self._folder / str(step), args=self._args.StandardSave(self._tree))
        self._async.wait_until_finished()

    def restore(self, step: int) -> None:
        import jax

        wanted = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self._tree
        )
        arrays = self._sync.restore(self._folder / str(step), args=self._args.StandardRestore(wanted))
        jax.block_until_ready(arrays)

    def forget(self, step: int) -> None:
        shutil.rmtree(self._folder / str(step))


class DcpSide:
    """The same bytes as host tensors, saved by torch.distributed.checkpoint in one process."""

    def __init__(self, folder: Path, ours: OurSide):
        import torch.distributed as dist

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
        self._folder = folder
        self._state = {
            f"{part}/{name}": torch.from_numpy(np.ones(tensor.shape, np.float32))
            for part, buffers in ours.parts.items()
            for name, tensor in buffers.items()
        }
        self._future: Any = None

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        # Copying ahead asks the accelerator for a stream, which torch_xla does not have.
        writer = dcp.FileSystemWriter(self._folder / str(step), per_thread_copy_ahead=0)
        self._future = dcp.async_save(self._state, storage_writer=writer)

    def wait(self) -> None:
        self._future.result()

    def forget(self, step: int) -> None:
        shutil.rmtree(self._folder / str(step))


def raw_read(folder: Path) -> None:
    """Every file of a step into one buffer."""
    buffer = bytearray(16 * 2**20)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _fail(line: str) -> None:
    raise AssertionError(f"unexpected: {line}")
