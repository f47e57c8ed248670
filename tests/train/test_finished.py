"""The command of a run, given again when there is nothing left to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tests.small_run import small_recipe
from tptrain.config import Recipe, SaveSection, ScheduleSection
from tptrain.errors import ProblemsError
from tptrain.train.run import train_recipe


def test_a_finished_run_is_told_to_be_and_left_alone(pretrained: Path, records: Path, tmp_path: Path) -> None:
    recipe = finished(pretrained, records, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    console = Console(record=True, width=200)
    result = train_recipe(recipe, console)
    assert "The run is finished: step 3 is saved and exported." in console.export_text()
    assert result.checkpoint.name == "3" and result.export_dir == tmp_path / "run" / "export"
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()
    }


def test_an_export_that_is_missing_is_written(pretrained: Path, records: Path, tmp_path: Path) -> None:
    recipe = finished(pretrained, records, tmp_path / "run")
    weights = (tmp_path / "run/export/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "export")
    train_recipe(recipe, Console(quiet=True))
    assert (tmp_path / "run/export/model.safetensors").read_bytes() == weights


def test_a_longer_run_does_not_write_over_an_export(pretrained: Path, records: Path, tmp_path: Path) -> None:
    finished(pretrained, records, tmp_path / "run")
    longer = finished_recipe(pretrained, records, tmp_path / "run", steps=5)
    with pytest.raises(ProblemsError, match=r"export.path=.*must not exist yet"):
        train_recipe(longer, Console(quiet=True))


def finished_recipe(pretrained: Path, records: Path, run: Path, steps: int = 3) -> Recipe:
    return small_recipe(
        pretrained,
        records,
        run,
        backend="torch",
        topology="cpu-1",
        resume="auto",
        schedule=ScheduleSection(max_steps=steps, warmup_steps=1),
        save=SaveSection(every_steps=0),
    )


def finished(pretrained: Path, records: Path, run: Path) -> Recipe:
    """The recipe of a run of three steps that is over."""
    recipe = finished_recipe(pretrained, records, run)
    train_recipe(recipe, Console(quiet=True))
    return recipe
