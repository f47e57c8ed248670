"""Several processes save and restore together, one per host: real processes, jax.distributed on loopback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tptrain.ckpt.digests import MANIFEST, files_of, read_manifest
from tptrain.ckpt.steps import saved_steps

ROOT = Path(__file__).parents[2]
PARTS = ("params", "mu", "nu")


def start(count: int, folder: Path, action: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """`count` workers on a port of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.hosts.worker",
                str(i),
                str(count),
                port,
                str(folder),
                action,
                *arguments,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def results(workers: list[subprocess.Popen[str]], word: str) -> list[object]:
    """What each worker printed as JSON after `word`; all must have ended well."""
    found = []
    for worker in workers:
        out, err = worker.communicate(timeout=240)
        assert worker.returncode == 0, err[-3000:]
        (line,) = [line for line in out.splitlines() if line.startswith(word)]
        found.append(json.loads(line[len(word) :]))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """Steps 1 and 2, saved by two processes from a 4x2 mesh; and the files that each wrote for step 2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return folder, results(start(2, folder, "save", "4x2", "1", "2"), "saved")  # type: ignore[return-value]


def test_each_process_writes_only_its_shards(saved: tuple[Path, list[list[str]]]) -> None:
    """Every chunk has one writer; the manifest names all of them, by the digest of its writer."""
    folder, (first, second) = saved
    assert saved_steps(folder) == [1, 2]
    assert first and second and not set(first) & set(second)
    step = folder / "2"
    chunks = {path for path in files_of(step) if path.startswith(tuple(PARTS)) and path[-1].isdigit()}
    assert chunks == {*first, *second}
    assert set(read_manifest(step).files) == set(files_of(step))
    # The vocabulary of 1031 over tensor=2: 516 and 515 rows, by two processes, never joined.
    head = {path for path in chunks if path.startswith("params/lm_head.weight/")}
    assert {path.split("/")[-1].split(".")[0] for path in head} == {"0", "1"}
    assert head & set(first) and head & set(second)


@pytest.mark.parametrize(("count", "mesh"), [(4, "2x4"), (2, "1x8"), (1, "8x1")])
def test_any_number_of_processes_restores_on_any_mesh(
    count: int, mesh: str, saved: tuple[Path, list[list[str]]]
) -> None:
    found = results(start(count, saved[0], "restore", mesh), "restored")
    assert found == [[2, True, 16, []]] * count


def test_a_process_that_is_killed_during_a_save_costs_only_that_save(
    saved: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    """Process 1 dies when it begins to write step 3. The other is stopped, as a job's manager does."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0], folder)
    workers = start(2, folder, "die", "4x2", "3")
    workers[1].wait(timeout=240)
    assert workers[1].returncode == -9
    time.sleep(2)  # whatever the others could still do without it, they have done by now
    for worker in workers:
        worker.kill()
        worker.communicate()
    assert saved_steps(folder) == [1, 2]
    assert results(start(1, folder, "restore", "2x4"), "restored") == [[2, True, 16, []]]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"], "the half of step 3 is cleared away"


def test_damage_that_one_process_finds_is_damage_to_all(
    saved: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    """Each file is verified by one process; all fall back to the same step and name the same file."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0], folder)
    bad = "nu/model.layers.1.mlp.down_proj.weight/0.0"
    content = bytearray((folder / "2" / bad).read_bytes())
    content[100] ^= 4
    (folder / "2" / bad).write_bytes(content)
    found = results(start(2, folder, "restore", "4x2"), "restored")
    assert found[0] == found[1]
    step, right, cursor, lines = found[0]  # type: ignore[misc]
    assert (step, right, cursor) == (1, True, 8)
    assert bad in lines[0] and "2.damaged-1" in lines[0] and "1 steps are lost" in lines[1]
    assert (folder / "2.damaged-1" / MANIFEST).exists()
