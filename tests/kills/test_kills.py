"""A run that is killed again and again equals one that was not: a small tools/bench/faults.py."""

from __future__ import annotations

from pathlib import Path

from tools.bench import faults

WANTED = {"save": 2, "steps": 1, "restore": 1, "compile": 1, "export": 1}


def test_a_killed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """SIGKILL in every kind of phase, told from the journal; then steps, rows and weights are equal."""
    found = faults.killed_runs(tmp_path, 12 * faults.SAVE_EVERY, WANTED, seed=1)
    assert all(found.kills[kind] >= count for kind, count in WANTED.items())
    assert found.runs > 0 and not found.problems


def test_the_comparison_sees_a_difference(tmp_path: Path) -> None:
    """Two runs with other seeds of the data differ, so equality above says something."""
    runs = [tmp_path / "one", tmp_path / "other"]
    total = faults.SAVE_EVERY
    for seed, run in enumerate(runs):
        command = [*faults.command(run, total), "backend=torch", f"data.seed={seed}"]
        alone = ["topology=cpu-1" if part.startswith("topology=") else part for part in command]
        faults.finish(faults.launch(alone), run)
    found = faults.differences(runs[0], runs[1], total)
    assert any(line.startswith("step 1:") for line in found)
    assert any(line.startswith("files of the last step") for line in found)
