"""Comparing and damaging the checkpoint steps and journals of whole runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tptrain.ckpt.reading import StepSource
from tptrain.ckpt.steps import saved_steps
from tptrain.config.plan import Plan
from tptrain.train.journal import read_journal


def journal_values(run: Path) -> list[dict[str, Any]]:
    """What a journal says of every step, but for how long things took and what the process had compiled."""
    lines = [asdict(record) for record in read_journal(run / "journal.jsonl")]
    return [
        {k: v for k, v in line.items() if not k.endswith("_seconds") and k != "compiles"} for line in lines
    ]


def journal_steps(run: Path) -> list[int]:
    return [record.step for record in read_journal(run / "journal.jsonl")]


def published(run: Path) -> list[int]:
    return saved_steps(run / "checkpoints")


def assert_same_state(plan: Plan, one: Path, other: Path) -> None:
    """Two steps hold the same weights and moments, bit for bit."""
    for part, described in plan.parts.items():
        left, right = StepSource(one / part), StepSource(other / part)
        for row in described.rows:
            if not row.saved:
                continue
            whole = tuple(slice(0, n) for n in row.size)
            values = left.read(row, whole)
            assert values.count_nonzero(), f"{part}/{row.name} is all zeros and compares nothing"
            assert torch.equal(values, right.read(row, whole)), f"{part}/{row.name}"


def damage(step_folder: Path) -> str:
    """Flip a bit in the middle of the largest file of the weights; returns its path inside the step."""
    files = [path for path in (step_folder / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return str(largest.relative_to(step_folder))
