"""What every recipe comes to on the slices it names; `python tests/config/golden_recipes.py` writes it.

tests/golden/recipes/<name>.json, topology -> mesh, batch, steps, attention, loops over layers, bytes of a
chip by part; and the parameter table with layers folded, which is the same for all of them.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from tptrain.config import Plan
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.estimate import estimate
from tptrain.report.param_lines import param_lines
from tptrain.report.plan_page import spec_text

ROOT = Path(__file__).resolve().parents[2]
RECIPES, GOLDEN = ROOT / "recipes", ROOT / "tests" / "golden" / "recipes"


def topologies(name: str) -> tuple[str, ...]:
    """The slices that a recipe names; none for one that is made for CPUs."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(getattr(module, "TOPOLOGIES", ()))


NAMES = [name for name in sorted(path.stem for path in RECIPES.glob("*.py")) if topologies(name)]


def plan_of(name: str, topology: str) -> Plan:
    recipe = load_recipe(RECIPES / f"{name}.py")
    return plan_recipe(apply_overrides(recipe, [f"topology={topology}"]), {"HF_HOME": "/nowhere"})


def golden_text(name: str) -> str:
    """The file of a recipe, one line for each row of the table and for each topology."""
    plans = {topology: plan_of(name, topology) for topology in topologies(name)}
    tables = [_table(plan) for plan in plans.values()]
    assert all(table == tables[0] for table in tables), f"{name}: a table for each slice"
    content = {"topologies": {key: _in_short(plan) for key, plan in plans.items()}, "table": tables[0]}
    return json.dumps(content, indent=1) + "\n"


def _table(plan: Plan) -> dict[str, str]:
    table = {}
    for line in param_lines(plan.table, plan.specs, plan.mesh.axis_sizes):
        size = " x ".join(map(str, line.row.size))
        table[line.name] = f"{size} {' '.join(line.row.dims)} {spec_text(line.spec)}"
    return table


def _in_short(plan: Plan) -> dict[str, Any]:
    found = estimate(plan)
    memory, data, schedule = found.memory, plan.recipe.data, plan.recipe.schedule
    runs = [f"{run.layers.start}..{run.layers[-1]} by {run.period}" for run in plan.layer_runs.runs]
    return {
        "mesh": plan.mesh.describe(),
        "batch": f"{data.batch_rows} rows of {data.seq_len} in micro-batches of {plan.micro_rows}",
        "rows_per_device": plan.device_rows,
        # Of a run by epochs the records decide, which a plan does not read.
        "steps": schedule.max_steps or f"those of {schedule.epochs} epochs",
        "attention": "splash" if plan.splash else "plain",
        "remat": plan.recipe.remat.policy,
        "loops": ", ".join(runs),
        "arguments_bytes": dict(memory.arguments),
        "largest_phase": memory.peak.name,
        "largest_phase_bytes": dict(memory.peak.parts),
        "total_bytes": memory.total_bytes,
        "verdict": found.verdict,
    }


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (GOLDEN / f"{name}.json").write_text(golden_text(name))
        print(GOLDEN / f"{name}.json")


if __name__ == "__main__":
    main()
