"""What it means when a run goes on with settings that are not those it was saved with.

A change is refused, or allowed and told, or allowed in silence. Settings of the data are judged by what they
lead to: the same samples in the same order go on where the run stood, others begin anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tptrain.ckpt.base_model import BaseModel, base_problems
from tptrain.config.model_config import described
from tptrain.config.plan import Plan
from tptrain.config.settings import shown
from tptrain.errors import Problem
from tptrain.family import read_config
from tptrain.mesh import AXES
from tptrain.report.plan_page import plan_json


class Change(Enum):
    """What a changed setting means."""

    REFUSED = "the run could not be the same one any more"
    TOLD = "allowed; a line says so"
    SILENT = "allowed; nothing of the training depends on it"
    DATA = "allowed; whether the cursor stays is told by the digest of the samples"
    FACTS = "judged by the facts of the model"
    BASE = "allowed below adapters, where it is the same model; refused without them"


# Setting, or the section it lies in -> meaning; the first match counts. What is not listed is refused: the
# other settings of the model, the precision and the seed. Another optimizer keeps another state; moments of
# another format are cast to it.
MEANINGS: tuple[tuple[str, Change], ...] = (
    ("model.config", Change.FACTS),
    ("model.pretrained", Change.BASE),
    ("data.batch_rows", Change.TOLD),
    ("data.", Change.DATA),
    ("optim.name", Change.REFUSED),
    ("optim.momentum", Change.REFUSED),
    ("optim.", Change.TOLD),
    ("schedule.", Change.TOLD),
    ("topology", Change.TOLD),
    ("mesh.", Change.TOLD),
    ("backend", Change.TOLD),
    ("remat.policy", Change.TOLD),
    ("loss.chunk_tokens", Change.TOLD),
    ("kernels.", Change.TOLD),
    ("compiler.", Change.TOLD),
    ("guards.", Change.TOLD),
    ("eval.", Change.SILENT),
    ("export.", Change.SILENT),
    ("save.", Change.SILENT),
    ("log.", Change.SILENT),
    ("output_dir", Change.SILENT),
    ("name", Change.SILENT),
    ("resume", Change.SILENT),
    ("unverified", Change.SILENT),
)


def meaning(setting: str) -> Change:
    """What a change of this setting means."""
    matching = (
        m for name, m in MEANINGS if setting == name or (name[-1] == "." and setting.startswith(name))
    )
    return next(matching, Change.REFUSED)


@dataclass(frozen=True)
class Continuation:
    """How a run goes on from a saved step.

    step:   the saved step. cursor: the global index of its next sample, 0 where the samples are others.
    lines:  what changed, one sentence each.
    """

    step: int
    cursor: int
    lines: tuple[str, ...]


def continuation_problems(plan: Plan, run: Mapping[str, Any], base: BaseModel | None = None) -> list[Problem]:
    """What keeps a plan from going on with a saved run. run: the `run` item of the step.

    base: the model below the plan's adapters, None without adapters.
    """
    refused = {Change.REFUSED} if base else {Change.REFUSED, Change.BASE}
    problems = [
        _must_stay(setting, value, saved)
        for setting, (value, saved) in _changes(plan, run).items()
        if meaning(setting) in refused
    ]
    if base is not None and "base" in run:
        problems += base_problems(base, run["base"], "model.pretrained")
    ours, theirs = (described(read_config(config)) for config in (plan.hf_config, run["hf_config"]))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            problems.append(_must_stay(f"model.config.{name}", ours.get(name), theirs.get(name)))
    return problems


def _must_stay(setting: str, value: object, saved: object) -> Problem:
    rule = "must stay as it was when a run goes on"
    return Problem(setting, shown(value), rule, f"saved with {shown(saved)}", shown(saved))


def continuation(plan: Plan, run: Mapping[str, Any], data_digest: str) -> Continuation:
    """How a plan without `continuation_problems` goes on.

    data_digest: `Batches.digest` of the plan's data.
    """
    changes = _changes(plan, run)
    allowed = (Change.TOLD, Change.BASE)
    told = [_line(s, *values) for s, values in changes.items() if meaning(s) in allowed]
    if plan.mesh.axis_sizes != run["mesh"]:
        told.append(f"mesh: {_mesh_text(run['mesh'])} -> {_mesh_text(plan.mesh.axis_sizes)}")
    of_data = [_line(s, *values) for s, values in changes.items() if meaning(s) is Change.DATA]
    same_order = run["seeds"]["data"] == plan.recipe.data.seed
    saved_digest = run.get("data_digest")
    # A checkpoint of another program has no digest: then the settings have to do.
    same_samples = saved_digest == data_digest if saved_digest else not of_data
    if same_samples and same_order:
        told += [f"{line} (the same records)" for line in of_data]
        return Continuation(run["step"], run["cursor"], tuple(told))
    differs = "the order of the records differs" if same_samples else "the records differ"
    of_data.append(f"{differs} from those of the saved run; taking them from the beginning")
    told.append(f"data: {', '.join(of_data)}")
    return Continuation(run["step"], 0, tuple(told))


def _changes(plan: Plan, run: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (value now, value saved) where they differ. A setting that was not saved has not changed."""
    asked, saved = plan_json(plan)["recipe"], run["recipe"]
    return {s: (value, saved[s]) for s, value in asked.items() if s in saved and saved[s] != value}


def _line(setting: str, value: object, saved: object) -> str:
    return f"{setting}: {shown(saved)} -> {shown(value)}"


def _mesh_text(sizes: Mapping[str, int]) -> str:
    split = [f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] > 1]
    return " x ".join(split) or "one device"
