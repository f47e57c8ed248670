"""Saving and restoring a run with Orbax.

A step on disk is `RUN/checkpoints/<step>/` with the items `params`, `mu` and `nu` (flat dicts of arrays by
Hugging Face name) and `run` (JSON: step, cursor, seeds, recipe, config, versions). Orbax publishes a step by
renaming it when everything is written, so a crash leaves the steps before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tptrain.backends.base import Backend, HostShards, Tensors
from tptrain.ckpt.bridge import disk_spec, from_jax, to_jax
from tptrain.ckpt.reading import RUN, read_run
from tptrain.config.plan import Plan
from tptrain.errors import Problem, ProblemsError, refuse
from tptrain.family import ParamRow, stored_rows
from tptrain.jaxside.specs import jax_mesh, named_sharding


@dataclass(frozen=True)
class Restored:
    """A step read back: the parts of the state on the devices, and the `run` item."""

    parts: dict[str, Tensors]
    run: dict[str, Any]


class Checkpointer:
    """Asynchronous checkpoints of one run."""

    def __init__(self, plan: Plan, backend: Backend, folder: Path):
        """folder: `RUN/checkpoints`, made if missing."""
        self._plan, self._backend, self._folder = plan, backend, folder.absolute()
        self._mesh = jax_mesh(plan.mesh)
        self._rows = {row.name: row for row in stored_rows(plan.table)}
        options = ocp.CheckpointManagerOptions(max_to_keep=plan.recipe.save.keep_last)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, parts: Mapping[str, Tensors], run: Mapping[str, Any]) -> None:
        """Start writing a step; returns when the shards are copied to the host.

        parts: part name -> buffers by name. A save still under way is finished first.
        """
        items: dict[str, Any] = {RUN: ocp.args.JsonSave(dict(run))}
        for part, buffers in parts.items():
            items[part] = ocp.args.StandardSave(self._arrays(self._backend.host_shards(buffers)))
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _arrays(self, held: Mapping[str, HostShards]) -> dict[str, jax.Array]:
        sizes = self._plan.mesh.axis_sizes
        return {name: to_jax(self._rows[name], shards, self._mesh, sizes) for name, shards in held.items()}

    def wait(self) -> None:
        """Return when the save under way is published; raise what went wrong with it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, step: int, parts: tuple[str, ...]) -> Restored:
        """Read a step of this run onto the devices, whatever mesh it was saved from."""
        if step not in self._manager.all_steps():
            known = ", ".join(str(s) for s in self._manager.all_steps()) or "none"
            rule = "must be a step that was saved"
            raise refuse("resume", step, rule, f"steps in {self._folder}: {known}", "one of them, or auto")
        folder = self._folder / str(step)
        restored = {part: restore_part(self._plan, self._backend, folder, part, "resume") for part in parts}
        return Restored(restored, read_run(folder))


def restore_part(plan: Plan, backend: Backend, step_folder: Path, part: str, setting: str) -> Tensors:
    """One item of a step (of any run of this model) as buffers on the devices; the step is only read.

    setting: the recipe's setting that named the step, for the list of what does not fit.
    """
    mesh, sizes = jax_mesh(plan.mesh), plan.mesh.axis_sizes
    rows = {row.name: row for row in stored_rows(plan.table)}
    folder = step_folder.absolute() / part
    with ocp.StandardCheckpointer() as reader:
        check_tree(reader.metadata(folder).item_metadata.tree, rows, setting, step_folder)
        wanted = {
            name: jax.ShapeDtypeStruct(
                row.size, row.storage_dtype, sharding=named_sharding(mesh, disk_spec(row, plan.specs[name]))
            )
            for name, row in rows.items()
        }
        arrays = reader.restore(folder, wanted)
    held = {name: from_jax(rows[name], array, plan.specs[name], sizes) for name, array in arrays.items()}
    return backend.restore_shards(held)


def check_tree(
    found: Mapping[str, Any], rows: Mapping[str, ParamRow], setting: str, step_folder: Path
) -> None:
    """List every tensor of a step that is missing, extra or misshapen, before any is read."""
    problems = []
    for name in sorted(set(rows) | set(found)):
        there = str(list(found[name].shape)) if name in found else "nothing"
        wanted = str(list(rows[name].size)) if name in rows else "nothing"
        if there != wanted:
            rule = f"{name} must be {wanted} as in the model's config"
            problems.append(
                Problem(setting, step_folder, rule, f"checkpoint has {there}", "a step of this model")
            )
    if problems:
        raise ProblemsError(problems)
