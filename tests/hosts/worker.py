"""One of several processes that save and restore together; a stand-in for a host with its chips.

    python -m tests.hosts.worker INDEX COUNT PORT FOLDER ACTION [ARGUMENT ...]

torch_xla's CPU client joins no processes, so the devices are stood in for by the shards that each process
would hold. Everything else is real: jax.distributed on loopback, the snapshot, Orbax, digests, restoring.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import small
from tptrain.backends.base import Buffer, Layout, Tensors, TensorSource, every_buffer
from tptrain.backends.shards import read_buffer_shards
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.ckpt.policies import KeepLast
from tptrain.config import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.errors import TptrainError
from tptrain.family import stored_rows
from tptrain.jaxside.hosts import barrier, join_hosts
from tptrain.mesh import shard_slices


@dataclass
class HeldBuffer:
    """A buffer of which this process holds some shards: mesh position -> tensor."""

    shards: dict[int, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards.values())


class HostBackend:
    """The part of a Backend that checkpoints use, for one of several processes."""

    def __init__(self, plan: Plan, local_positions: tuple[int, ...]):
        self.plan, self.local_positions = plan, local_positions
        parts = plan.parts.values()
        self.layouts = {part.name: Layout.stacked(part.rows, part.specs, plan.layer_runs) for part in parts}

    def place(
        self,
        source: TensorSource,
        part: str = PARAMS,
        wanted: Callable[[Buffer], bool] = every_buffer,
    ) -> Any:
        placed = {}
        for name, buffer in self.layouts[part].buffers.items():
            if not wanted(buffer):
                continue
            slices = shard_slices(buffer.rows[0].padded_size, buffer.row_spec, self.plan.mesh.axis_sizes)
            mine = {position: slices[position] for position in self.local_positions}
            placed[name] = HeldBuffer(read_buffer_shards(buffer, mine, source))
        return placed

    def fetch_shards(self, tensors: Mapping[str, Any]) -> dict[str, dict[int, torch.Tensor]]:
        return {name: held.shards for name, held in tensors.items()}

    def sync(self) -> None:
        pass


def expected_parts(plan: Plan, step: int) -> dict[str, Tensors]:
    """The whole tensors of a step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return {
        part: {row.name: torch.randn(row.size, generator=generator) for row in stored_rows(plan.table)}
        for part in plan.parts
    }


def same(backend: HostBackend, parts: Mapping[str, Any], expected: Mapping[str, Tensors]) -> bool:
    """Whether the shards that this process holds are those of the expected tensors, bit for bit."""
    for part in backend.plan.parts:
        theirs = backend.place(small.DictSource(expected[part]))
        for name, held in parts[part].items():
            for position, shard in held.shards.items():
                if not torch.equal(shard, theirs[name].shards[position]):
                    return False
    return True


def main() -> None:
    index, count, port, folder, action, *arguments = sys.argv[1:]
    join_hosts(f"127.0.0.1:{port}", int(count), int(index))
    fsdp, tensor = (int(n) for n in arguments[0].split("x"))
    plan = small.small_plan(fsdp, tensor)
    # Every count-th position: dims are split across processes, and so is the padded vocabulary.
    backend = HostBackend(plan, tuple(range(int(index), 8, int(count))))
    lines: list[str] = []
    checkpointer = Checkpointer(
        plan, backend, Path(folder), keep=[KeepLast(3)], say=lines.append, on_phase=phase_hook(action)
    )
    if action in ("save", "die"):
        for step in (int(number) for number in arguments[1:]):
            parts = {p: backend.place(small.DictSource(t)) for p, t in expected_parts(plan, step).items()}
            checkpointer.save(step, parts, {"step": step, "cursor": 8 * step})
            for buffers in parts.values():  # what a next step would do to its donated buffers
                for held in buffers.values():
                    for shard in held.shards.values():
                        shard.fill_(-1.0)
            checkpointer.wait()
        wrote = [
            f"{item}/{file}" for item, writer in checkpointer._writers.items() for file in writer.digests
        ]
        print("saved", json.dumps(sorted(wrote)), flush=True)
    else:
        restored = checkpointer.restore(None, tuple(plan.parts), lambda run: None)
        right = same(backend, restored.parts, expected_parts(plan, restored.step))
        print("restored", json.dumps([restored.step, right, restored.run["cursor"], lines]), flush=True)
    barrier("done")


def phase_hook(action: str) -> Any:
    """For the action "die": process 1 is killed as soon as it begins to write its last step."""

    def on_phase(kind: str, phase: str, step: int) -> None:
        last = step == int(sys.argv[-1]) and (kind, phase) == ("begin", "write")
        if action == "die" and last and sys.argv[1] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    return on_phase


if __name__ == "__main__":
    try:
        main()
    except TptrainError as error:
        print("refused", error, flush=True)
        sys.exit(2)
