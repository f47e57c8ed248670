"""Restoring a step: what must hold before its weights are read, and verifying them while they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.backends.base import Backend, Tensors
from tptrain.ckpt.arrays import is_chunk
from tptrain.ckpt.digests import (
    MANIFEST,
    BackgroundCheck,
    Damage,
    Manifest,
    ManifestError,
    damages,
    listing_damages,
    read_manifest,
)
from tptrain.ckpt.reading import StepSource, check_tree, describe, lora_of
from tptrain.ckpt.steps import read_run, saved_steps, set_aside
from tptrain.config.plan import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.errors import Problem, raise_if_any, refuse
from tptrain.family import ParamRow
from tptrain.jaxside.hosts import barrier, first_text, is_primary, process_count, process_index

Accept = Callable[[Mapping[str, Any]], None]
# Item of a step -> the rows that are read of it, which are all it holds.
Rows = Mapping[str, Sequence[ParamRow]]


@dataclass(frozen=True)
class Restored:
    """A step read back: the parts of the state on the devices, and the `run` item."""

    step: int
    parts: dict[str, Tensors]
    run: dict[str, Any]


class DamagedError(Exception):
    """A step is not what was saved; the message names the files."""


class UnverifiedError(Exception):
    """A step has no manifest."""


def saved_rows(plan: Plan, parts: Iterable[str]) -> Rows:
    """What a step of the plan's run holds."""
    return {part: [row for row in plan.parts[part].rows if row.saved] for part in parts}


def restore_newest(
    plan: Plan,
    backend: Backend,
    folder: Path,
    parts: Sequence[str],
    accept: Accept,
    unverified: bool,
    say: Callable[[str], None],
) -> Restored:
    """The newest step that is intact. Damaged ones are set aside, ones without a manifest passed over."""
    steps = saved_steps(folder, unverified=True)
    for step in reversed(steps):
        try:
            rows = saved_rows(plan, parts)
            restored = _restore(plan, backend, folder / str(step), rows, accept, unverified, "resume")
        except DamagedError as error:
            say(f"Step {step} is damaged: {error}. It is set aside as {_set_aside(folder, step)}.")
        except UnverifiedError:
            say(f"Step {step} has no {MANIFEST} and is passed over; --unverified would go on from it.")
        else:
            if step < steps[-1]:
                say(f"Going on from step {step}: {steps[-1] - step} steps are lost.")
            return restored
    rule, other = "must find a step that is intact", f"none of the steps {steps} in {folder} is"
    raise refuse(
        "resume", "auto", rule, other, "another output_dir, or --unverified for one without manifest"
    )


def _set_aside(folder: Path, step: int) -> str:
    name = set_aside(folder, step, "damaged").name if is_primary() else ""
    barrier(f"step {step} is set aside")
    return first_text(name)


def restore_step(
    plan: Plan, backend: Backend, step_folder: Path, parts: Sequence[str], accept: Accept, unverified: bool
) -> Restored:
    """One step of the run, or ProblemsError when it is missing, damaged or not verified."""
    steps = saved_steps(step_folder.parent, unverified)
    if int(step_folder.name) not in steps:
        known = ", ".join(map(str, steps)) or "none"
        rule, other = "must be a step that was saved", f"steps in {step_folder.parent}: {known}"
        raise refuse("resume", step_folder.name, rule, other, "one of them, or auto")
    return _told(
        lambda: _restore(plan, backend, step_folder, saved_rows(plan, parts), accept, unverified, "resume"),
        step_folder,
        "resume",
    )


def restore_part(
    plan: Plan, backend: Backend, step_folder: Path, part: str, setting: str, unverified: bool = False
) -> Tensors:
    """One item of a step (of any run of this model) as buffers on the devices; the step is only read.

    Adapters are left out: the step holds the model that they stand on.

    setting: the recipe's setting that named the step, for messages.
    """

    def accept(run: Mapping[str, Any]) -> None:
        if lora_of(run) is not None:
            rule, other = "must hold a whole model", "it holds the adapters of a run with lora.rank"
            fix = "the run's export, or what tools/convert_ckpt.py makes of the step"
            raise refuse(setting, step_folder, rule, other, fix)

    folder = step_folder.absolute()
    rows = {part: [row for row in plan.parts[part].rows if not row.is_adapter]}
    return _told(
        lambda: _restore(plan, backend, folder, rows, accept, unverified, setting), folder, setting
    ).parts[part]


def _told(restore: Callable[[], Restored], step_folder: Path, setting: str) -> Restored:
    """Damage as a problem of the setting that chose the step."""
    try:
        return restore()
    except DamagedError as error:
        rule, fix = "must hold what was saved", "another step, or auto for the newest good one"
        raise refuse(setting, step_folder, rule, str(error), fix) from error
    except UnverifiedError as error:
        rule = "must have a digest manifest, or nothing tells whether it is intact"
        fix = "another step, or --unverified to take it all the same"
        raise refuse(setting, step_folder, rule, f"no {MANIFEST} in it", fix) from error


def _restore(
    plan: Plan,
    backend: Backend,
    step_folder: Path,
    rows: Rows,
    accept: Accept,
    unverified: bool,
    setting: str,
) -> Restored:
    """Small files first, then the weights, verified while they are read. rows: of each item, all it holds.

    Every process takes the same turns: damage that one of them finds is damage to all.
    """
    manifest = _manifest(step_folder, unverified)
    run = read_run(step_folder)
    accept(run)
    raise_if_any(_tree_problems(plan, step_folder, rows, setting))
    items = tuple(f"{part}/" for part in rows)
    files = manifest.files if manifest else ()
    paths = sorted(path for path in files if path.startswith(items) and is_chunk(path))
    check = BackgroundCheck(step_folder, manifest, paths[process_index() :: process_count()])
    failure = ""
    placed: dict[str, Tensors] = {}
    try:
        for part, held in rows.items():
            placed[part] = _placed(backend, step_folder, part, held)
    except (OSError, ValueError) as error:  # what tensorstore raises for files it cannot read
        failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    _raise_damage(check.result(), failure)
    return Restored(int(run["step"]), placed, run)


def _placed(backend: Backend, step_folder: Path, part: str, rows: Sequence[ParamRow]) -> Tensors:
    names = {row.name for row in rows}
    source = StepSource(step_folder / part)
    return backend.place(source, part, lambda buffer: buffer.rows[0].name in names)


def _tree_problems(plan: Plan, step_folder: Path, rows: Rows, setting: str) -> list[Problem]:
    """Items that are missing and arrays that do not fit; no values are read.

    Moments are cast to the dtype that the plan has for them. Weights are, where a run begins with those of a
    step; one that goes on has to find its own.
    """
    missing = [part for part in rows if not (step_folder / part).is_dir()]
    if missing:
        found = sorted(path.name for path in step_folder.iterdir() if path.is_dir())
        rule = f"must hold what optim.name={plan.recipe.optim.name} keeps: {', '.join(missing)}"
        fix = "the optimizer it was saved with, or a new run with model.pretrained=STEP for its weights alone"
        return [Problem(setting, step_folder, rule, f"it holds {', '.join(found)}", fix)]
    problems: list[Problem] = []
    for part, held in rows.items():
        any_float = part != PARAMS or tuple(rows) == (PARAMS,)
        problems += check_tree(step_folder / part, {row.name: row for row in held}, setting, any_float)
    return problems


def _manifest(step_folder: Path, unverified: bool) -> Manifest | None:
    """The manifest of a step whose files are all there and whose small items are intact."""
    found: list[Damage] = []
    manifest = None
    try:
        manifest = read_manifest(step_folder)
        found = listing_damages(step_folder, manifest)
        small = [path for path in manifest.files if not is_chunk(path)]
        found += damages(step_folder, manifest, small) if not found else []
    except FileNotFoundError:
        if not unverified:
            raise UnverifiedError(step_folder.name) from None
    except ManifestError as error:
        found = [Damage(MANIFEST, str(error))]
    _raise_damage(found)
    return manifest


def _raise_damage(found: list[Damage], failure: str = "") -> None:
    reason = first_text(describe(found) if found else failure)
    if reason:
        raise DamagedError(reason)
