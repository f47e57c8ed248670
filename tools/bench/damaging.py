"""Damage a run's newest checkpoint in every way of tools/bench/damages.py, and restore; opens the devices."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tools.bench.damages import DAMAGES
from tptrain.backends.make import make_backend
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.ckpt.steps import saved_steps
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe


def damage_all(run: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """How many damages there are, how many were found by name, and how many cost only that step.

    arguments: the recipe and the settings of the run.
    """
    recipe = apply_overrides(load_recipe(arguments[0]), list(arguments[1:]))
    plan = plan_recipe(replace(recipe, backend="torch", topology="cpu-1"))
    backend = make_backend(plan)
    source = run / "checkpoints"
    older, newest = (str(step) for step in saved_steps(source)[-2:])
    expected = restored(plan, backend, source, int(older), []).parts
    found = fallbacks = 0
    for name, damage in DAMAGES.items():
        folder = run.parent / "damaged"
        for step in (older, newest):
            shutil.copytree(source / step, folder / step)
        file = damage(folder / newest)
        lines: list[str] = []
        back = restored(plan, backend, folder, None, lines)
        named = any(file in line for line in lines)
        equal = back.step == int(older) and all(
            torch.equal(back.parts[part][n], t) for part in plan.parts for n, t in expected[part].items()
        )
        found, fallbacks = found + named, fallbacks + equal
        if not (named and equal):
            print(f"damage {name}: named {named}, restored {back.step}, equal {equal}: {lines}")
        shutil.rmtree(folder)
    return {"damages": len(DAMAGES), "damages_detected": found, "fallbacks_ok": fallbacks}


def restored(plan: Any, backend: Any, folder: Path, step: int | None, lines: list[str]) -> Any:
    checkpointer = Checkpointer(plan, backend, folder, say=lines.append)
    return checkpointer.restore(step, tuple(plan.parts), lambda run: None)
