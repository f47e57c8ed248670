"""Reading a checkpoint step as whole tensors on the host, one at a time: what an export needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import torch

from tptrain.ckpt.bridge import to_torch
from tptrain.errors import refuse
from tptrain.family import ParamRow

# Items of a step: the weights, and what a run needs to go on.
PARAMS = "params"
RUN = "run"


def is_step_folder(path: Path) -> bool:
    """Whether a folder is a published checkpoint step of ours."""
    return (path / PARAMS).is_dir() and (path / RUN).is_dir()


def find_step(path: Path, setting: str) -> Path:
    """The step folder that a path means: a step itself, a run (its newest step) or a `checkpoints` folder."""
    if is_step_folder(path):
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    published = sorted(step for step in steps if is_step_folder(folder / str(step)))
    if not published:
        rule = "must be a checkpoint step, or a run that has one"
        raise refuse(setting, path, rule, f"no step in {folder}", "RUN/checkpoints/STEP")
    return folder / str(published[-1])


def read_run(step_folder: Path) -> dict[str, Any]:
    """The JSON item of a step: step, cursor, seeds, recipe, config, versions."""
    folder = step_folder.absolute() / RUN
    run: dict[str, Any] = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder)
    return run


class StepReader:
    """A checkpoint step, read on the host. `run` is its JSON item."""

    def __init__(self, step_folder: Path):
        self._folder = step_folder.absolute()
        self.run = read_run(step_folder)
        self._reader = ocp.PyTreeCheckpointer()

    def read(self, row: ParamRow) -> torch.Tensor:
        """One whole unpadded tensor in the format it was saved in; nothing else is read."""
        item = {row.name: jax.ShapeDtypeStruct(row.size, row.storage_dtype)}
        as_numpy = {row.name: ocp.RestoreArgs(restore_type=np.ndarray)}
        restored = self._reader.restore(
            self._folder / PARAMS, args=ocp.args.PyTreeRestore(item, as_numpy, partial_restore=True)
        )
        return to_torch(restored[row.name])
