"""The thin mains in tools/, the journal they read, and the Makefile."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tools import plot_runs
from tptrain.errors import ProblemsError
from tptrain.train.journal import JOURNAL_FILE, Journal, StepRecord, read_journal

ROOT = Path(__file__).resolve().parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def record(step: int, **changes: float) -> StepRecord:
    """A made-up step whose every curve has another shape."""
    values = {
        "step": step,
        "loss": 5.0 / step,
        "counted_tokens": 700,
        "real_tokens": 900 + step,
        "padded_tokens": 124,
        "grad_norm": 3.0 + math.sin(step),
        "learning_rate": 1e-3 * step,
        "step_seconds": 0.5 + 0.01 * step,
        "trace_seconds": 0.2 if step == 1 else 0.0,
        "compile_seconds": 9.0 if step == 1 else 0.0,
        "input_seconds": 1e-4,
        "compiles": 1,
        "cursor": 8 * step,
    }
    return StepRecord(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[str, int], Path]:
    """Makes a run's folder, with a journal of so many steps."""

    def make(name: str, steps: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        journal = Journal(folder, keep_steps=0)
        for step in range(1, steps + 1):
            journal(record(step))
        journal.close()
        return folder

    return make


class TestJournal:
    def test_reads_what_was_written(self, make_run: Callable[[str, int], Path]) -> None:
        assert read_journal(make_run("run", 4) / JOURNAL_FILE) == [record(step) for step in range(1, 5)]

    def test_cut_last_line_is_left_out(self, make_run: Callable[[str, int], Path]) -> None:
        path = make_run("run", 4) / JOURNAL_FILE
        whole = path.read_bytes()
        # Cut anywhere in the last line, even just before its line break.
        last_line = len(json.dumps(asdict(record(4)))) + 1
        for cut in (1, 2, last_line // 2, last_line - 1):
            path.write_bytes(whole[:-cut])
            assert [r.step for r in read_journal(path)] == [1, 2, 3], cut

    def test_steps_that_are_done_again_are_cut(self, make_run: Callable[[str, int], Path]) -> None:
        folder = make_run("run", 6)
        journal = Journal(folder, keep_steps=4)
        journal(record(5, loss=0.25))
        journal.close()
        records = read_journal(folder / JOURNAL_FILE)
        assert [r.step for r in records] == [1, 2, 3, 4, 5] and records[-1].loss == 0.25


class TestPlotRuns:
    def test_four_panels_show_the_journals(self, make_run: Callable[[str, int], Path]) -> None:
        runs = plot_runs.read_runs([make_run("first", 7), make_run("second", 11)])
        figure = plot_runs.draw(runs)
        assert len(figure.axes) == 4
        for axes, panel in zip(figure.axes, plot_runs.PANELS, strict=True):
            assert [line.get_label() for line in axes.get_lines()] == ["first", "second"]
            for line, records in zip(axes.get_lines(), runs.values(), strict=True):
                assert np.asarray(line.get_xdata()).tolist() == [r.step for r in records]
                assert np.asarray(line.get_ydata()).tolist() == [panel.value(r) for r in records]
        shown = [panel.value(record(3)) for panel in plot_runs.PANELS]
        assert shown == [5 / 3, 3 + math.sin(3), 3e-3, pytest.approx(903 / 0.53)]
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]

    def test_writes_a_png(self, make_run: Callable[[str, int], Path], tmp_path: Path) -> None:
        out = tmp_path / "both.png"
        # 150 steps are drawn smoothed as well.
        assert plot_runs.main([str(make_run("a", 3)), str(make_run("b", 150)), "--out", str(out)]) == 0
        assert out.read_bytes().startswith(PNG_SIGNATURE) and out.stat().st_size > 20_000

    def test_mean_is_centred(self) -> None:
        straight = [3.0 * step for step in range(40)]
        assert plot_runs.centred_mean(straight, 8) == pytest.approx(straight)
        spike = [0.0] * 10 + [5.0] + [0.0] * 10
        assert list(plot_runs.centred_mean(spike, 4)).index(1.0) == 8
        assert plot_runs.centred_mean(spike, 4)[8:13] == pytest.approx([1.0] * 5)

    def test_runs_of_one_name_are_told_apart(self) -> None:
        names = plot_runs.legend_names([Path("x/run"), Path("y/run")])
        assert names == ["x/run", "y/run"]
        assert len(set(plot_runs.legend_names([Path("x/run"), Path("x/run")]))) == 2

    def test_every_bad_run_is_a_problem(self, make_run: Callable[[str, int], Path], tmp_path: Path) -> None:
        empty, other, none = make_run("empty", 0), make_run("other", 1), tmp_path / "none"
        (other / JOURNAL_FILE).write_text('{"step": 1, "loss": 2.0}\n')
        (tmp_path / "no_journal").mkdir()
        with pytest.raises(ProblemsError) as caught:
            plot_runs.read_runs([empty, none, tmp_path / "no_journal", other, make_run("good", 2)])
        parts = [(p.setting, p.value, p.rule, p.other, p.fix) for p in caught.value.problems]
        a_run, fix = "must be the folder of a run", "the output_dir of a run"
        finished = "a run that has finished a step"
        assert parts[:3] == [
            ("RUN", empty, "must have at least one step", "journal.jsonl holds none", finished),
            ("RUN", none, a_run, "no such folder", fix),
            ("RUN", tmp_path / "no_journal", a_run, "no journal.jsonl in it", fix),
        ]
        setting, value, rule, found, advice = parts[3]
        assert (setting, value, advice) == ("RUN", other, "a run of this version")
        assert rule == "must have a journal.jsonl of this tptrain" and "counted_tokens" in found

    def test_bad_target(
        self, make_run: Callable[[str, int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = str(make_run("run", 2))
        assert plot_runs.main([run, "--out", str(tmp_path / "curves.jpg")]) == 2
        assert (
            f"must be a PNG file (its ending is .jpg); use {tmp_path}/curves.png" in capsys.readouterr().err
        )
        assert plot_runs.main([run, "--out", str(tmp_path / "none" / "curves.png")]) == 2
        assert "must be a file that can be written (No such file or directory)" in capsys.readouterr().err


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """make as from a shell, also when the tests themselves are run by make."""
    left_out = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "QUICKSTART_MESH", "CPU_NUM_DEVICES", "PYTHON", "ARGS")
    environ = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run(["make", *arguments], cwd=folder, env=environ, capture_output=True, text=True)


@needs_make
class TestMakefile:
    @staticmethod
    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_make(ROOT, *arguments)

    @pytest.mark.parametrize(("mesh", "devices"), [("4x2", 8), ("1x3", 3), ("16x1", 16)])
    def test_quickstart_on_a_mesh(self, mesh: str, devices: int) -> None:
        done = self.make("-n", "quickstart", f"QUICKSTART_MESH={mesh}")
        fsdp, tensor = mesh.split("x")
        assert done.returncode == 0, done.stderr
        assert f"topology=cpu-{devices} " in done.stdout
        assert "output_dir=runs/quickstart-" in done.stdout
        assert f" mesh.fsdp={fsdp} mesh.tensor={tensor}" in done.stdout

    def test_quickstart_on_one_device(self) -> None:
        done = self.make("-n", "quickstart", "QUICKSTART_MESH=")
        assert done.returncode == 0 and "mesh." not in done.stdout and "CPU_NUM_DEVICES" not in done.stdout

    @pytest.mark.parametrize("mesh", ["4", "4x", "x2", "0x2", "2x3x4", "4 x 2", "fourxtwo", "4*2", "a'b"])
    def test_wrong_mesh(self, mesh: str) -> None:
        done = self.make("-n", "quickstart", f"QUICKSTART_MESH={mesh}")
        assert done.returncode == 2 and done.stdout == ""
        wanted = "must be two whole numbers above 0, fsdp x tensor, such as 4x2"
        assert f"QUICKSTART_MESH={mesh} {wanted}" in done.stderr

    def test_help_lists_every_target(self) -> None:
        shown = self.make().stdout
        for target in ("quickstart", "test", "test-vllm", "test-compat", "lint", "bench", "clean", "help"):
            assert f"\n  {target} " in shown, target

    def test_test_runs_every_folder_of_tests(self) -> None:
        commands = self.make("-n", "test").stdout
        for folder in {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}:
            assert f"-m pytest tests/{folder}\n" in commands

    def test_old_python_is_refused(self, tmp_path: Path) -> None:
        """In a copy, since the environment is already there here."""
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        (tmp_path / "requirements").mkdir()
        shutil.copy(ROOT / "requirements" / "constraints.txt", tmp_path / "requirements")
        old = tmp_path / "python3.9"
        old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.1 || exit 1\n')
        old.chmod(0o755)
        done = run_make(tmp_path, "lint", f"PYTHON={old}")
        assert done.returncode == 2
        message = f"tptrain needs Python 3.11, 3.12 or 3.13; '{old}' is: Python 3.9.1."
        assert message in done.stdout and not (tmp_path / ".venv").exists()
