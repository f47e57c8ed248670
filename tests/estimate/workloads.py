"""Plans and workloads that the tests of tptrain.estimate share; no two sizes are equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tests.config.samples import small_recipe
from tptrain.config import Plan
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.estimate.workload import Workload, workload_of

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]


def small_plan(*overrides: str) -> Plan:
    """3 layers, D 96, N 8, K 4, H 12, F 176, V 1031; 48 rows x 256 tokens; cpu-8 as fsdp=4 x tensor=2."""
    given = {override.partition("=")[0] for override in overrides}
    mesh = [] if "topology" in given else ["mesh.fsdp=4", "mesh.tensor=2"]
    remat = [] if "remat.policy" in given else ["remat.policy=full"]
    return plan_recipe(apply_overrides(small_recipe(), [*mesh, *remat, *overrides]), {})


def small_work(*overrides: str, **changes: Any) -> Workload:
    """The same with plain attention and all logits at once, unless `changes` says otherwise."""
    work = workload_of(small_plan(*overrides))
    return dataclasses.replace(work, **{"attention": "plain", "loss_chunk_tokens": None, **changes})


def llama3_plan(topology: str, seq_len: int, rows: int, *overrides: str) -> Plan:
    """Llama-3-8B with full remat; rows of a whole step."""
    recipe = load_recipe(ROOT / "recipes" / "llama3_8b_gsm8k.py")
    sizes = [f"topology={topology}", f"data.seq_len={seq_len}", f"data.batch_rows={rows}"]
    # What the tests count by hand is the plain core, also where a kernel would take its place.
    named = any(each.startswith("kernels.attention=") for each in overrides)
    plain = [] if named else ["kernels.attention=plain"]
    given = [*plain, *sizes, *overrides]
    return plan_recipe(apply_overrides(recipe, given), {"HF_HOME": "/nowhere"})


def llama3_work(seq_len: int, rows_per_chip: int, **changes: Any) -> Workload:
    """The same on 16 chips, fsdp=16, with splash attention and all logits: as MaxText's numbers were made."""
    work = workload_of(llama3_plan("v5p-32", seq_len, 16 * rows_per_chip))
    return dataclasses.replace(work, **{"attention": "splash", "loss_chunk_tokens": None, **changes})
