"""`inspect`: what a step or a folder holds, from its metadata, and whether its files are what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.convert.models import Run, run_tool, write_model
from tools.bench.damages import DAMAGES
from tptrain.ckpt.digests import MANIFEST

# 30 tensors: see `small_config`.
PARAMETERS = 2 * 131 * 48 + 48 + 3 * (48 * 60 * 2 + 48 * 20 * 2 + 3 * 48 * 80 + 2 * 48)


def page(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[str]:
    assert run_tool("inspect", *words) == code
    told = capsys.readouterr()
    assert told.err == ""
    return told.out.splitlines()


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    return json.loads("\n".join(page(capsys, *words, "--json")))


def test_a_step_as_a_page(shared_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(capsys, shared_run.step(10))
    size = f"{PARAMETERS * 4 / 1e3:,.2f} kB"
    assert lines[0] == f"{shared_run.step(10)}: a checkpoint step"
    assert lines[1] == f"  params: 30 tensors, float32, {size}"
    assert "    3 x model.layers.*.self_attn.k_proj.weight  [20, 48] float32, 11.52 kB" in lines
    assert "    lm_head.weight  [131, 48] float32, 25.15 kB" in lines
    for moment in ("mu", "nu"):
        at = lines.index(f"  {moment}: 30 tensors, float32, {size}")
        assert lines[at + 1] == "    the same tensors as params"
    assert f"  total: {3 * PARAMETERS * 4 / 1e3:,.2f} kB, files: " in "\n".join(lines)
    files = len([path for path in shared_run.step(10).rglob("*") if path.is_file()]) - 1
    assert f"  manifest: present, {files} files, xxh3_128, digests not compared (--verify does)" in lines
    for fact in ("step: 10", "cursor: 80", "seeds: init 3, data 5", "mesh: fsdp 4, tensor 2"):
        assert f"  {fact}" in lines
    assert "  versions: tptrain 0.0.1" in lines


def test_a_step_as_json(copied: Callable[[], Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = copied()
    run.score(step10=0.5)
    found = as_json(capsys, run.folder, "--from-step", "best", "--verify")
    assert (found["kind"], found["path"]) == ("step", str(run.step(10)))
    assert found["total_bytes"] == 3 * PARAMETERS * 4
    files = [path for path in run.step(10).rglob("*") if path.is_file() and path.name != MANIFEST]
    assert found["disk_bytes"] == sum(path.stat().st_size for path in files)
    assert list(found["items"]) == ["params", "mu", "nu"]
    head = {"shape": [131, 48], "dtype": "float32", "num_bytes": 131 * 48 * 4}
    assert found["items"]["nu"]["arrays"]["lm_head.weight"] == head
    assert (found["run"]["cursor"], found["run"]["hf_config"]["vocab_size"]) == (80, 131)
    assert found["manifest"] == {
        "state": "present",
        "files": len(files),
        "algorithm": "xxh3_128",
        "metrics": {"exact_match": 0.5},
        "verified": True,
        "problems": [],
    }


def test_only_verify_reads_the_values(copied: Callable[[], Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = copied()
    file = DAMAGES["last bit of a moment"](run.step(20))
    assert "digests not compared" in "\n".join(page(capsys, run.folder))
    lines = page(capsys, run.folder, "--verify", code=1)
    wrong = f"1 problems: {file} (its digest is not that of what was saved)"
    assert f"  manifest: present, {wrong}" in lines


@pytest.mark.parametrize("name", ["weights gone", "weights cut", "a chunk too many", "manifest empty"])
def test_what_needs_no_reading_is_always_found(
    name: str, copied: Callable[[], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied()
    file = DAMAGES[name](run.step(20))
    told = "\n".join(page(capsys, run.step(20), code=1))
    assert file in told and "params: 30 tensors" in told


def test_no_manifest(copied: Callable[[], Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = copied()
    (run.step(20) / MANIFEST).unlink()
    expected = "  manifest: absent, so nothing tells whether the files are intact"
    assert expected in page(capsys, run.step(20), "--verify")
    assert as_json(capsys, run.step(20))["manifest"]["state"] == "absent"


def test_a_step_that_cannot_be_read(copied: Callable[[], Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = copied()
    (run.step(20) / "run" / "metadata").write_text("{")
    assert run_tool("inspect", run.step(20)) == 2
    assert f"PATH={run.step(20)}: must be readable (" in capsys.readouterr().err


@pytest.mark.parametrize("shards", [1, 4])
def test_a_folder(shards: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = "1GB" if shards == 1 else f"{PARAMETERS * 2 // 3 // 1000}kB"
    source = write_model(tmp_path / "source", "bfloat16", max_shard_size=size)
    lines = page(capsys, source)
    files = sorted(path.name for path in source.glob("*.safetensors"))
    kind = "model.safetensors" if shards == 1 else "model.safetensors.index.json"
    assert lines[0] == f"{source}: a Hugging Face folder ({kind}), {len(files)} files, 30 tensors"
    assert [line.split(":")[0].strip() for line in lines if "safetensors: " in line] == files
    assert f"  total: {PARAMETERS * 2 / 1e3:,.2f} kB, files: " in "\n".join(lines)
    found = as_json(capsys, source)
    assert (found["kind"], found["run"], found["manifest"]) == ("folder", None, None)
    names = [name for item in found["items"].values() for name in item["arrays"]]
    assert len(names) == 30 and found["total_bytes"] == PARAMETERS * 2
    assert {a["dtype"] for item in found["items"].values() for a in item["arrays"].values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verify"], "--verify=given: needs digests to compare with"),
        (["--from-step", "best"], "--from-step=best: needs a run to choose a step of"),
    ],
)
def test_what_a_folder_has_not(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("inspect", write_model(tmp_path / "source"), *words) == 2
    assert message in capsys.readouterr().err


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("inspect", tmp_path / "no" / "such" / "folder") == 2
    assert "must be a folder or a hub id" in capsys.readouterr().err
