"""One run that moves: 8 devices, then 4x2, then 2x2x2, then one device, with the next sample each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tptrain.train.journal import StepRecord, read_journal

ROOT = Path(__file__).parents[2]
# (data, fsdp, tensor) and the step at which the run stops there.
STAGES = [((1, 8, 1), 3), ((1, 4, 2), 6), ((2, 2, 2), 8), ((1, 1, 1), 10)]
TOTAL = STAGES[-1][1]


def train(run: Path, mesh: tuple[int, int, int], steps: int) -> str:
    """Train up to a step with the command; a vocabulary of 577 that no mesh divides. Returns what it says."""
    data, fsdp, tensor = mesh
    settings = {
        "topology": f"cpu-{data * fsdp * tensor}",
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
        "output_dir": run,
        "schedule.kind": "constant",
        "schedule.warmup_steps": 2,
        "schedule.max_steps": steps,
        "data.max_records": 300,
        "data.batch_rows": 8,
        "data.seq_len": 64,
        "model.config.vocab_size": 577,
        "model.config.num_hidden_layers": 2,
        "eval.problems": 0,
        "export.enabled": "false",
        "log.tensorboard": "false",
    }
    command = [sys.executable, "-m", "tptrain", "train", str(ROOT / "recipes/tiny_word_problems.py")]
    command += ["--resume", "auto", *(f"{name}={value}" for name, value in settings.items())]
    result = subprocess.run(command, capture_output=True, text=True, cwd=run.parent)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[StepRecord], list[str]]:
    run = tmp_path_factory.mktemp("moved") / "run"
    said = [train(run, mesh, steps) for mesh, steps in STAGES]
    return read_journal(run / "journal.jsonl"), said


@pytest.fixture(scope="module")
def stayed(tmp_path_factory: pytest.TempPathFactory) -> list[StepRecord]:
    """The same steps on one device, without interruption."""
    run = tmp_path_factory.mktemp("stayed") / "run"
    train(run, (1, 1, 1), TOTAL)
    return read_journal(run / "journal.jsonl")


def test_every_step_has_the_rows_that_come_next(
    moved: tuple[list[StepRecord], list[str]], stayed: list[StepRecord]
) -> None:
    ours, _ = moved
    assert [record.step for record in ours] == list(range(1, TOTAL + 1))
    assert [r.rows_digest for r in ours] == [r.rows_digest for r in stayed]
    assert len({r.rows_digest for r in ours}) == TOTAL
    assert [r.cursor for r in ours] == [8 * step for step in range(1, TOTAL + 1)]


def test_the_curve_is_that_of_one_device(
    moved: tuple[list[StepRecord], list[str]], stayed: list[StepRecord]
) -> None:
    ours, _ = moved
    assert [r.loss for r in ours] == pytest.approx([r.loss for r in stayed], rel=1e-4)
    assert [r.grad_norm for r in ours] == pytest.approx([r.grad_norm for r in stayed], rel=1e-3)
    assert [r.learning_rate for r in ours] == [r.learning_rate for r in stayed]


def test_every_move_is_told(moved: tuple[list[StepRecord], list[str]]) -> None:
    _, said = moved
    assert "mesh" not in said[0].split("Going on")[-1] or "->" not in said[0]
    assert "fsdp=8 -> fsdp=4 x tensor=2" in said[1]
    assert "fsdp=4 x tensor=2 -> data=2 x fsdp=2 x tensor=2" in said[2]
    assert "-> one device" in said[3]
    assert "schedule.max_steps: 3 -> 6" in said[1]
