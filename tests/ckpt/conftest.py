"""Saved steps on the torch backend: what is on disk does not depend on the devices."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import small
from tptrain.backends.base import Tensors
from tptrain.backends.make import quiet_libraries
from tptrain.backends.torch_backend import TorchBackend
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.ckpt.policies import KeepLast, KeepPolicy
from tptrain.ckpt.restoring import Restored
from tptrain.config import Plan
from tptrain.family import stored_rows
from tptrain.jaxside.process import setup_jax

quiet_libraries()
setup_jax(1)

SHARED_PLAN = small.torch_plan()


def parts_of_step(plan: Plan, step: int) -> dict[str, Tensors]:
    """Random tensors that belong to a step, other ones in every part."""
    generator = torch.Generator().manual_seed(step)
    return {
        part: {row.name: torch.randn(row.size, generator=generator) for row in stored_rows(plan.table)}
        for part in plan.parts
    }


def anything(run: Mapping[str, Any]) -> None:
    """Accepts every `run` item."""


@dataclass
class Run:
    """The checkpoints of a run in a folder of its own, and what it has told."""

    folder: Path
    keep: tuple[KeepPolicy, ...] = (KeepLast(10),)
    lines: list[str] = field(default_factory=list)
    phases: list[tuple[str, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = SHARED_PLAN
        self.backend = TorchBackend(self.plan)
        self.checkpointer = Checkpointer(
            self.plan,
            self.backend,
            self.folder,
            self.keep,
            self.lines.append,
            lambda *what: self.phases.append(what),
        )

    def save(self, *steps: int, metrics: Mapping[str, float] | None = None) -> None:
        for step in steps:
            run = {"step": step, "cursor": 8 * step}
            self.checkpointer.save(step, parts_of_step(self.plan, step), run, metrics)
            self.checkpointer.wait()

    def restore(self, step: int | None = None, unverified: bool = False) -> Restored:
        return self.checkpointer.restore(step, tuple(self.plan.parts), anything, unverified)

    def assert_is_step(self, restored: Restored, step: int) -> None:
        expected = parts_of_step(self.plan, step)
        assert restored.step == step and restored.run == {"step": step, "cursor": 8 * step}
        for part in self.plan.parts:
            assert set(restored.parts[part]) == set(expected[part])
            for name, tensor in restored.parts[part].items():
                assert torch.equal(tensor, expected[part][name]), (part, name)


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the steps 10 and 20, not to be changed."""
    folder = tmp_path_factory.mktemp("shared") / "checkpoints"
    run = Run(folder)
    run.save(10, 20)
    run.checkpointer.close()
    return folder


@pytest.fixture
def copied(two_steps: Path, tmp_path: Path) -> Callable[[], Run]:
    """A run over a copy of the two steps, made when it is called."""

    def make() -> Run:
        folder = tmp_path / "checkpoints"
        shutil.copytree(two_steps, folder, dirs_exist_ok=True)
        return Run(folder)

    return make
