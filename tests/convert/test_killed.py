"""Conversions killed with SIGKILL in real processes: OUT is whole or absent, and the next one clears up."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.convert.killed import convert_and_die, convert_and_die_at_rename
from tests.convert.models import Run, names_in, run_tool, write_model

Files = dict[str, bytes]

_NOT_COMPARED = ("_CHECKPOINT_METADATA", "commit_success.txt", "manifest.json")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes quickly: they are forked from one that has imported everything and used nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.convert.killed"])
    return context


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("killed") / "source", "bfloat16")


@pytest.fixture(params=["to_hf", "from_hf"])
def source(request: pytest.FixtureRequest, shared_run: Run, model: Path) -> Path:
    return shared_run.folder if request.param == "to_hf" else model


@pytest.fixture
def killed(processes: Any) -> Callable[..., None]:
    """Runs a function in a process that must end by SIGKILL."""

    def run(function: Callable[..., None], *arguments: object) -> None:
        process = processes.Process(target=function, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode == -9

    return run


def content(folder: Path) -> Files:
    """Every file but those in which Orbax writes times and the folder's name while it was written."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _NOT_COMPARED
    }


def assert_clean_and_equal(source: Path, out: Path) -> None:
    """`out` is alone in its folder, and what an undisturbed conversion makes."""
    assert names_in(out.parent) == [out.name]
    aside = out.parent / "again"
    assert run_tool(source, aside) == 0
    assert content(out) == content(aside)
    assert run_tool("diff", out, aside) == 0


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_killed_while_it_writes(part: float, source: Path, killed: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(convert_and_die, [str(source), str(out)], part)
    assert len(names_in(tmp_path)) == 1 and names_in(tmp_path)[0].startswith("out.partial-")
    assert run_tool(source, out) == 0
    assert_clean_and_equal(source, out)


@pytest.mark.parametrize("target", ["/checkpoints/0", "/manifest.json"])
def test_killed_while_the_step_is_committed(target: str, model: Path, killed: Any, tmp_path: Path) -> None:
    """Orbax's own rename, and the one that publishes a step: here neither makes OUT."""
    out = tmp_path / "out"
    for after in (False, True):
        killed(convert_and_die_at_rename, [str(model), str(out)], target, after)
        assert not out.exists()
    assert run_tool(model, out) == 0
    assert_clean_and_equal(model, out)


@pytest.mark.parametrize("after", [False, True])
def test_killed_around_the_last_rename(after: bool, source: Path, killed: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(convert_and_die_at_rename, [str(source), str(out)], "/out", after)
    assert out.exists() is after
    assert run_tool(source, out, "--overwrite") == 0
    assert_clean_and_equal(source, out)


@pytest.mark.parametrize("moment", ["writing", "before the rename", "after it"])
def test_killed_while_it_replaces(moment: str, source: Path, killed: Any, tmp_path: Path) -> None:
    """The earlier or the new one is whole, and the next conversion leaves the new one alone there."""
    out, new = tmp_path / "out", tmp_path / "new"
    words = [str(source), str(out), "--overwrite"]
    assert run_tool(source, out, "--dtype", "float16") == 0 and run_tool(source, new) == 0
    earlier, later = content(out), content(new)
    shutil.rmtree(new)
    if moment == "writing":
        killed(convert_and_die, words, 0.5)
        assert content(out) == earlier
    else:
        killed(convert_and_die_at_rename, words, "/out", moment == "after it")
        whole = [out, *tmp_path.glob("out.replaced-*")]
        assert earlier != later and any(content(folder) in (earlier, later) for folder in whole)
        assert content(out) in ({}, earlier, later)
    assert run_tool(*words) == 0
    assert_clean_and_equal(source, out)
