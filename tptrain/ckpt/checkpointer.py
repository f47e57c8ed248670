"""Saving a run's state in the background, and restoring the newest good one.

A step on disk is `RUN/checkpoints/STEP` with the items `params`, `mu` and `nu` (flat dicts of arrays by
Hugging Face name; `params` of a run with adapters holds these alone), `run` (JSON: step, cursor, seeds,
recipe, config, versions) and the digest manifest. Orbax writes the items and commits them by a rename; the
manifest comes last and publishes the step. Older steps are deleted only then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from tptrain.backends.base import Backend, Tensors
from tptrain.ckpt.host_array import HostArrayHandler, array_item_handler
from tptrain.ckpt.policies import KeepLast, KeepPolicy, steps_to_delete
from tptrain.ckpt.publishing import publish
from tptrain.ckpt.restoring import Accept, Restored, restore_newest, restore_step
from tptrain.ckpt.snapshot import Snapshot
from tptrain.ckpt.steps import RUN, delete_step, remove_leftovers, set_aside, with_metrics
from tptrain.config.plan import Plan
from tptrain.errors import TptrainError
from tptrain.heap import trim_heap
from tptrain.jaxside.hosts import barrier, is_primary

# How long a failed save waits for items that are still being written before it removes them.
_PATIENCE_SECONDS = 10.0

# (begin or end, phase, step)
OnPhase = Callable[[str, str, int], None]


class SaveError(TptrainError):
    """A step could not be saved; the steps before it are untouched."""


class Checkpointer:
    """The checkpoints of one run. With several processes, each has one and all make the same calls.

    in_flight: the step that is being written in the background, or None.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        folder: Path,
        keep: Sequence[KeepPolicy] = (KeepLast(2),),
        say: Callable[[str], None] = print,
        on_phase: OnPhase = lambda kind, phase, step: None,
    ):
        """folder: `RUN/checkpoints`, made if missing; leftovers of processes that were killed are removed.

        keep:     what stays when a new step is published; what no policy keeps is deleted.
        say:      tells the user one line; on_phase: is told when "save" (copying, the run waits), "write" and
                  "commit" (both in the background) begin and end. Both are called from two threads.
        """
        self._plan, self._backend, self._folder = plan, backend, folder.absolute()
        self._keep, self._say, self._on_phase = tuple(keep), say, on_phase
        self._snapshot: Snapshot | None = None
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._writers: dict[str, HostArrayHandler] = {}
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        self.in_flight: int | None = None
        if is_primary():
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._folder)
        barrier("checkpoints are open")

    def save(
        self,
        step: int,
        parts: Mapping[str, Tensors],
        run: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Start saving a step; returns when the state is copied, and the next step may change it.

        parts: part name -> buffers by name, of which those that a checkpoint holds are saved.
        metrics: scores of the step, for policies and `--from-step best`.
        A save still under way is finished first. A save that fails in the background is told at once; `wait`
        raises it. Raises SaveError when not even the start succeeds.
        """
        if self.in_flight is not None:
            self._say(f"Step {step} waits to be saved until step {self.in_flight} is written.")
        self._join()
        if self._orbax is None:
            self._clear_leftovers()
        self._error = None
        self._on_phase("begin", "save", step)
        try:
            self._start(step, self._saved(parts), run)
        except OSError as error:
            raise self._failed(step, error) from error
        finally:
            self._on_phase("end", "save", step)
        self.in_flight = step
        self._on_phase("begin", "write", step)
        # A daemon, so that a run that is told to exit at once does not wait for a disk.
        self._thread = threading.Thread(
            target=self._finish, args=(step, dict(metrics or {})), name="tptrain-save", daemon=True
        )
        self._thread.start()

    def _saved(self, parts: Mapping[str, Tensors]) -> dict[str, Tensors]:
        layouts = self._backend.layouts
        return {
            part: {name: t for name, t in tensors.items() if layouts[part].buffers[name].saved}
            for part, tensors in parts.items()
        }

    def _start(self, step: int, parts: Mapping[str, Tensors], run: Mapping[str, Any]) -> None:
        if self._snapshot is None:
            self._snapshot = Snapshot(self._plan, self._backend, tuple(parts))
        if self._orbax is None:
            self._orbax = self._open_orbax(parts)
        self._snapshot.take(parts)
        target = self._folder / str(step)
        if target.exists() and is_primary():
            # Left by a process that was killed before it could publish it, or by an earlier timeline.
            set_aside(self._folder, step, "unpublished")
        arrays = {part: ocp.args.PyTreeSave(self._snapshot.arrays[part]) for part in parts}
        self._orbax.save(target, args=ocp.args.Composite(**{RUN: ocp.args.JsonSave(dict(run))}, **arrays))

    def _open_orbax(self, parts: Mapping[str, Tensors]) -> ocp.AsyncCheckpointer:
        made = {part: array_item_handler() for part in parts}
        self._writers = {part: writer for part, (_, writer) in made.items()}
        handlers = {part: handler for part, (handler, _) in made.items()}
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(**{RUN: ocp.JsonCheckpointHandler()}, **handlers)
        )

    def _finish(self, step: int, metrics: Mapping[str, float]) -> None:
        """In the background: wait for Orbax, publish, delete what is no longer kept."""
        phase = "write"
        trim_heap()  # of what the copy has left; here the run does not wait for it
        try:
            assert self._orbax is not None
            self._orbax.wait_until_finished()
            self._on_phase("end", "write", step)
            phase = "commit"
            self._on_phase("begin", "commit", step)
            publish(self._folder / str(step), step, metrics, self._writers)
            if is_primary():
                for old in steps_to_delete(with_metrics(self._folder), self._keep):
                    delete_step(self._folder, old)
        except Exception as error:  # whatever it is, the run must hear of it and go on
            self._error = self._failed(step, error)
            self._say(str(self._error))
        finally:
            trim_heap()
            self._on_phase("end", phase, step)
            self.in_flight = None

    def _failed(self, step: int, error: Exception) -> SaveError:
        """The error of a failed save, whose files are removed so that the next one has their room."""
        self._orbax = None
        for writer in self._writers.values():
            writer.wait_idle(_PATIENCE_SECONDS)
        self._clear_leftovers()
        steps = with_metrics(self._folder)
        newest = f"step {steps[-1].step} is the newest one saved" if steps else "no step is saved yet"
        reason = str(error).strip().split("\n")[0]
        return SaveError(f"step {step} could not be saved in {self._folder}: {reason}; {newest}")

    def _clear_leftovers(self) -> None:
        """Remove what a failed save has written; what is still written to, at the next save."""
        if is_primary():
            with contextlib.suppress(OSError):
                remove_leftovers(self._folder)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Return when no save is under way; raise SaveError if the last one failed."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for a save under way and give up the host memory."""
        self._join()
        if self._orbax is not None:
            self._orbax.close()
        self._orbax = self._snapshot = None

    def restore(
        self, step: int | None, parts: tuple[str, ...], accept: Accept, unverified: bool = False
    ) -> Restored:
        """Read a step of this run onto the devices, whatever mesh it was saved from, and verify it.

        step:   None for the newest good one: a damaged step is set aside by name and the one before is tried.
        accept: is given the `run` item before any weights are read, and raises what forbids going on with it.
        unverified: take also a step that has no manifest.
        Raises ProblemsError when no step can be restored.
        """
        if step is None:
            return restore_newest(
                self._plan, self._backend, self._folder, parts, accept, unverified, self._say
            )
        return restore_step(self._plan, self._backend, self._folder / str(step), parts, accept, unverified)
