"""What a save leaves on disk, in which order, and what it does when the disk is full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ckpt.conftest import Run, parts_of_step
from tptrain.backends.shards import Slices
from tptrain.ckpt.arrays import BLOCK_BYTES, CHUNK_BYTES, chunk_shape, chunks_of
from tptrain.ckpt.digests import digest_file, files_of, read_manifest
from tptrain.ckpt.policies import KeepBest, KeepEvery, KeepLast
from tptrain.ckpt.steps import find_step, saved_steps
from tptrain.errors import ProblemsError

ROOT = Path(__file__).parents[2]


def test_the_manifest_names_every_file_with_its_digest(two_steps: Path) -> None:
    step = two_steps / "20"
    manifest = read_manifest(step)
    assert set(manifest.files) == set(files_of(step))
    assert any(path.startswith("nu/lm_head.weight/") for path in manifest.files)
    for path, digest in manifest.files.items():
        assert digest_file(step / path) == digest, path


def test_a_step_is_published_by_its_manifest_and_old_ones_go_only_then(tmp_path: Path) -> None:
    """The phases in order; at the begin of "commit" the files are there and the step is not yet one."""
    run = Run(tmp_path / "checkpoints", keep=(KeepLast(1),))
    seen: list[tuple[str, str, int, list[int]]] = []
    run.checkpointer._on_phase = lambda *what: seen.append((*what, saved_steps(run.folder)))
    run.save(1, 2)
    phases = [(kind, phase) for phase in ("save", "write", "commit") for kind in ("begin", "end")]
    assert [what[:2] for what in seen if what[2] == 2] == phases
    assert [what[3] for what in seen if what[2] == 2] == [[1]] * 5 + [[2]]


def test_policies_decide_what_stays(tmp_path: Path) -> None:
    keep = (KeepLast(1), KeepEvery(4), KeepBest(1, "exact_match"))
    run = Run(tmp_path / "checkpoints", keep=keep)
    for step, score in ((1, 0.1), (2, 0.7), (4, 0.3), (5, 0.2), (6, 0.4)):
        run.save(step, metrics={"exact_match": score})
    assert saved_steps(run.folder) == [2, 4, 6]
    assert find_step(run.folder.parent, "x").name == "6"
    assert find_step(run.folder.parent, "x", "best").name == "2"
    assert find_step(run.folder.parent, "x", "4").name == "4"
    with pytest.raises(ProblemsError, match=r"--from-step=5: .*2, 4, 6"):
        find_step(run.folder.parent, "x", "5")


def test_one_save_at_a_time_and_the_next_says_that_it_waits(tmp_path: Path) -> None:
    run = Run(tmp_path / "checkpoints")
    checkpointer = run.checkpointer
    checkpointer.save(1, parts_of_step(run.plan, 1), {"step": 1, "cursor": 8})
    assert checkpointer.in_flight == 1
    checkpointer.save(2, parts_of_step(run.plan, 2), {"step": 2, "cursor": 16})
    assert saved_steps(run.folder) in ([1], [1, 2])
    checkpointer.wait()
    assert checkpointer.in_flight is None
    assert run.lines == ["Step 2 waits to be saved until step 1 is written."]
    run.assert_is_step(run.restore(1), 1)
    run.assert_is_step(run.restore(2), 2)


def test_what_killed_processes_left_is_cleared_and_does_not_block_a_save(
    two_steps: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("30.orbax-checkpoint-tmp/params", "20.deleting/params", "40/params", "40/run"):
        (folder / name).mkdir(parents=True)
    run = Run(folder)
    assert [path.name for path in folder.iterdir()] == ["40"], "committed by Orbax, not yet published"
    run.save(40)
    run.assert_is_step(run.restore(), 40)
    assert (folder / "40.unpublished-1").is_dir()


DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from tests.ckpt.conftest import Run
from tptrain.ckpt.checkpointer import SaveError

run = Run(Path(sys.argv[1]))
run.save(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    run.save(2)
except SaveError as error:
    print("failed", error)
print("left", sorted(path.name for path in run.folder.iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run.assert_is_step(run.restore(), 1)
run.save(3)
run.assert_is_step(run.restore(), 3)
print("told", len(run.lines), run.lines[0])
"""


def test_a_full_disk_costs_that_save_and_nothing_else(tmp_path: Path) -> None:
    """No file may grow beyond 50 kB: the save of step 2 fails, step 1 stays, and step 3 is saved later."""
    command = [sys.executable, "-c", DISK_FULL, str(tmp_path / "checkpoints")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert result.returncode == 0, result.stderr[-3000:]
    failed, left, told = result.stdout.splitlines()[-3:]
    assert failed.startswith("failed step 2 could not be saved") and "step 1 is the newest" in failed
    assert "File too large" in failed or "FILE_TOO_LARGE" in failed or "Exceeds" in failed, failed
    assert left == "left ['1']", "the half of step 2 gives its room back"
    assert told.startswith("told 1 step 2 could not be saved")


@pytest.mark.parametrize(
    ("piece", "shape"),
    [
        ((7168, 1024), (14336, 4096)),
        ((128256, 16), (128256, 4096)),
        ((16032, 4096), (128256, 4096)),
        ((1031, 120), (1031, 120)),
        ((4099, 40960), (8198, 40960)),
        ((4096,), (4096,)),
        ((), ()),
    ],
)
def test_chunks_divide_pieces_and_stay_small(piece: tuple[int, ...], shape: tuple[int, ...]) -> None:
    chunks = chunk_shape(piece, shape, 4)
    assert len(chunks) == len(piece)
    if piece and piece[0] % chunks[0] == 0 and chunks != piece:
        assert np.prod(chunks) * 4 <= CHUNK_BYTES
        assert chunks[0] * np.prod(shape[1:]) * 4 <= BLOCK_BYTES
    if piece and piece[0] != shape[0]:
        assert piece[0] % chunks[0] == 0, "a chunk never spans two pieces"
    assert chunks[1:] == piece[1:]


def test_chunks_cover_a_piece_once() -> None:
    wanted: Slices = (slice(6, 13), slice(10, 20))
    found = dict(chunks_of(wanted, (3, 5)))
    assert found == {
        (2, 2): (slice(6, 9), slice(10, 15)),
        (2, 3): (slice(6, 9), slice(15, 20)),
        (3, 2): (slice(9, 12), slice(10, 15)),
        (3, 3): (slice(9, 12), slice(15, 20)),
        (4, 2): (slice(12, 13), slice(10, 15)),
        (4, 3): (slice(12, 13), slice(15, 20)),
    }
