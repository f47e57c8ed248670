"""Replacing an exported folder: only when asked to, only a model folder, and only by one that is complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.weights.killed import export_ones, export_with
from tests.weights.test_killed_export import content, nothing, siblings
from tptrain.errors import ProblemsError
from tptrain.weights import blocks_of, check_export_target


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_ones(out, 1.0)
    (out / "notes.txt").write_text("of the earlier export")
    expected = content(export_ones(tmp_path / "expected", 2.0))
    export_ones(out, 2.0, overwrite=True)
    assert content(out) == expected
    assert siblings(out) == ["expected", "out"]


def test_the_earlier_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = content(export_ones(out, 1.0))
    seen = []

    def look(num_bytes: int) -> None:
        seen.append(content(out) == old)

    export_ones(out, 2.0, overwrite=True, progress=look)
    assert len(seen) > 5 and all(seen)


def test_a_failure_keeps_the_earlier_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = content(export_ones(out, 1.0))
    with pytest.raises(RuntimeError, match="nothing to read"):
        export_with(out, nothing, overwrite=True)
    too_large = blocks_of(lambda row: torch.full(row.size, 1e6))
    with pytest.raises(ProblemsError, match="hold every weight"):
        export_with(out, too_large, overwrite=True, dtype="float16")
    assert content(out) == old and siblings(out) == ["out"]


def test_a_new_or_empty_folder_needs_no_replacing(tmp_path: Path) -> None:
    expected = content(export_ones(tmp_path / "new", 1.0, overwrite=True))
    (tmp_path / "empty").mkdir()
    assert content(export_ones(tmp_path / "empty", 1.0, overwrite=True)) == expected


def test_a_relative_path_is_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export_ones(Path("out"), 1.0)
    export_ones(Path("out"), 2.0, overwrite=True)
    assert siblings(tmp_path / "out") == ["out"]


def test_what_is_no_model_folder_is_not_replaced(tmp_path: Path) -> None:
    """Nobody's home directory, checkpoints or dataset may go because of a mistyped path."""
    for name in ("folder", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    export_ones(tmp_path / "model", 1.0)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = siblings(tmp_path / "out")
    reasons = {
        "folder": "no config.json",
        "file": "it is a file",
        "link": "it is a link",
        "dangling": "it is a link",
    }
    for name, reason in reasons.items():
        [problem] = check_export_target(tmp_path / name, overwrite=True)
        assert problem.rule.endswith("to be replaced") and reason in problem.other
        with pytest.raises(ProblemsError, match=reason):
            export_ones(tmp_path / name, 2.0, overwrite=True)
    assert siblings(tmp_path / "out") == before
