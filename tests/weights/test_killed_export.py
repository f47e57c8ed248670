"""Killed exports, with real processes and SIGKILL: what is left is whole, and the next export clears up."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.weights.killed import export_and_die, export_and_hang, export_ones, export_with
from tptrain.errors import ProblemsError
from tptrain.family import ParamRow
from tptrain.weights import check_export_target
from tptrain.weights.leftovers import partial_folder, recover

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes quickly: they are forked from one that has imported torch and nothing has used it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.weights.killed"])
    return context


def content(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def nothing(row: ParamRow) -> Iterator[torch.Tensor]:
    raise RuntimeError("nothing to read")


def next_export_fails(out: Path) -> None:
    """An export that changes nothing itself, but first deals with what others have left."""
    with pytest.raises(RuntimeError, match="nothing to read"):
        export_with(out, nothing, overwrite=True)


def siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_a_killed_export_is_absent_and_its_leftovers_go_with_the_next(tmp_path: Path, processes: Any) -> None:
    out, started = tmp_path / "out", processes.Event()
    process = processes.Process(target=export_and_hang, args=(out, started), daemon=True)
    process.start()
    assert started.wait(60)
    [alive] = siblings(out)
    assert alive.startswith(f"out.partial-{process.pid}-")

    next_export_fails(out)
    assert siblings(out) == [alive], "a live writer's folder must not be touched"
    assert list((tmp_path / alive).glob("*/*.safetensors"))

    process.kill()
    process.join()
    assert process.exitcode == -9
    assert not out.exists() and siblings(out) == [alive]
    export_ones(out, 2.0)
    assert siblings(out) == ["out"]


def test_what_is_published_has_no_lock_in_it(tmp_path: Path) -> None:
    names = content(export_ones(tmp_path / "out", 1.0))
    assert set(names) == {
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *(f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)),
    }


def test_killed_at_any_step_of_replacing_a_folder_one_of_the_two_is_whole(
    tmp_path: Path, processes: Any
) -> None:
    """One process per step; the last survives. Either result is right, a third or none would not be."""
    old, new = (content(export_ones(tmp_path / name, factor)) for name, factor in (("a", 1.0), ("b", 2.0)))
    assert old != new
    is_new = []
    for step in itertools.count():
        out = tmp_path / str(step) / "out"
        export_ones(out, 1.0)
        process = processes.Process(target=export_and_die, args=(out, 2.0, step))
        process.start()
        process.join(60)
        aside = list(out.parent.glob("out.replaced-*"))
        assert all(content(folder) == old for folder in aside), "under that name it would be put back"
        assert content(out) in (old, new) or (aside and not out.exists()), (step, siblings(out))
        next_export_fails(out)
        assert siblings(out) == ["out"] and content(out) in (old, new), (step, siblings(out))
        is_new.append(content(out) == new)
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
    assert is_new == sorted(is_new), "once the new one is there, it stays"
    assert sum(is_new) > 5 and is_new.count(False) > 10, (
        "it is killed often before that, and some times after"
    )


def test_a_folder_left_aside_counts_as_existing_and_comes_back(tmp_path: Path) -> None:
    """The state after a kill between the two renames, as the test above meets it."""
    out = tmp_path / "out"
    old = content(export_ones(out, 1.0))
    out.rename(tmp_path / "out.replaced-123-0123abcd")
    [problem] = check_export_target(out)
    assert problem.rule == "must not exist yet" and "out.replaced-123-0123abcd" in problem.other
    assert check_export_target(out, overwrite=True) == []
    with pytest.raises(ProblemsError, match="must not exist yet"):
        export_ones(out, 2.0)
    assert siblings(out) == ["out"] and content(out) == old


def test_an_earlier_folder_goes_when_the_new_one_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_ones(tmp_path / "out.replaced-123-0123abcd", 1.0)
    new = content(export_ones(out, 2.0, overwrite=True))
    next_export_fails(out)
    assert siblings(out) == ["out"] and content(out) == new


@pytest.mark.parametrize(
    "name",
    [
        "out.partial-1",
        "out.partial-1-0123abcd.bak",
        "out.partial-x-0123abcd",
        "outer.partial-1-0123abcd",
        "a",
    ],
)
def test_folders_with_names_of_their_own_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(b"half")
    export_ones(tmp_path / "out", 1.0)
    assert siblings(tmp_path / "out") == sorted([name, "out"])
    assert content(tmp_path / name) == {"model.safetensors": b"half"}


def test_a_folder_is_not_cleared_away_before_its_writer_has_locked_it(tmp_path: Path) -> None:
    """Two writers at once: one looks for leftovers all the time, while the other starts again and again."""
    out, done, looks = tmp_path / "out", threading.Event(), []

    def look_for_leftovers() -> None:
        while not done.is_set():
            recover(out)
            looks.append(1)

    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(look_for_leftovers)
        try:
            for _ in range(300):
                with partial_folder(out) as partial:
                    (partial / "content").mkdir()
        finally:
            done.set()
        looking.result()
    assert len(looks) > 30 and siblings(out) == []


def test_a_link_that_is_named_like_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_bytes(b"kept")
    (tmp_path / "out.partial-1-0123abcd").symlink_to(tmp_path / "mine")
    export_ones(tmp_path / "out", 1.0)
    assert content(tmp_path / "mine") == {"file": b"kept"}
