"""From a step to a model folder: which step, which files, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

from tests.convert.models import Run, assert_same_bits, names_in, run_tool, tensors_in, write_run
from tools import convert_ckpt
from tools.bench.damages import DAMAGES, MOMENT, flip
from tptrain.ckpt.digests import MANIFEST
from tptrain.errors import ProblemsError

ROOT = Path(__file__).resolve().parents[2]
# Damage to what is not read for a conversion, and cannot be seen without reading it.
_IN_MOMENTS = ("last bit of a moment", "bit of the tree's metadata")


@pytest.mark.parametrize(("named", "step"), [("", 20), ("checkpoints", 20), ("checkpoints/10", 10)])
def test_weights_arrive_bit_for_bit(shared_run: Run, named: str, step: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_tool(shared_run.folder / named, out, "--dtype", "float32") == 0
    assert_same_bits(tensors_in(out), shared_run.weights[step])
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (shared_run.folder / "assets" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_are_cast_as_torch_casts(shared_run: Run, dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_tool(shared_run.folder, out, *(["--dtype", dtype] if dtype != "bfloat16" else [])) == 0
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in shared_run.weights[20].items()}
    assert_same_bits(tensors_in(out), expected)


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tied=True, steps=(3,))
    assert "lm_head.weight" not in run.weights[3]
    assert run_tool(run.folder, tmp_path / "out", "--dtype", "float32") == 0
    assert_same_bits(tensors_in(tmp_path / "out"), run.weights[3])


def test_files_are_as_small_as_asked(
    shared_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, assets = tmp_path / "out", shared_run.folder / "assets"
    assert run_tool(shared_run.folder, out, "--max-shard-gb", "2e-5", "--assets", assets) == 0
    assert len(list(out.glob("*.safetensors"))) > 1 and (out / "model.safetensors.index.json").exists()
    told = capsys.readouterr()
    assert f"{shared_run.step(20)} -> {out}: " in told.out and "bfloat16" in told.out
    assert "writing: " in told.err and "/s" in told.err


class TestFromStep:
    def test_best_is_the_highest_score(self, copied: Callable[[], Run], tmp_path: Path) -> None:
        run = copied()
        run.score(step10=0.75, step20=0.5)
        assert run_tool(run.folder, tmp_path / "out", "--from-step", "best", "--dtype", "float32") == 0
        assert_same_bits(tensors_in(tmp_path / "out"), run.weights[10])

    @pytest.mark.parametrize(("which", "step"), [("latest", 20), ("10", 10)])
    def test_latest_or_a_number(self, shared_run: Run, which: str, step: int, tmp_path: Path) -> None:
        words = ["--from-step", which, "--dtype", "float32"]
        assert run_tool(shared_run.folder, tmp_path / "out", *words) == 0
        assert_same_bits(tensors_in(tmp_path / "out"), shared_run.weights[step])

    @pytest.mark.parametrize(
        ("named", "which", "message"),
        [
            ("", "15", "--from-step=15: must be a step that was saved, latest or best (steps in "),
            ("", "newest", "--from-step=newest: must be a step that was saved, latest or best"),
            ("", "best", "must have scored steps for --from-step best (no step has the score exact_match)"),
            ("checkpoints/10", "latest", "--from-step=latest: needs a run to choose a step of (SOURCE="),
        ],
    )
    def test_what_is_refused(
        self,
        shared_run: Run,
        named: str,
        which: str,
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run_tool(shared_run.folder / named, tmp_path / "out", "--from-step", which) == 2
        assert message in capsys.readouterr().err and names_in(tmp_path) == []


class TestDamage:
    @pytest.mark.parametrize("name", [name for name in DAMAGES if name not in _IN_MOMENTS])
    def test_a_damaged_step_is_refused_by_the_files_name(
        self, name: str, copied: Callable[[], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = copied()
        file = DAMAGES[name](run.step(20))
        assert run_tool(run.step(20), tmp_path / "out") == 2
        told = capsys.readouterr().err
        assert f"SOURCE={run.step(20)}: must hold what was saved" in told
        # Of two damaged files, the first that is read.
        assert file in told or file.replace("layers.1", "layers.0") in told
        assert names_in(tmp_path) == ["run"], "nothing of it is left"

    def test_moments_are_not_read(self, copied: Callable[[], Run], tmp_path: Path) -> None:
        run = copied()
        flip(MOMENT, 0.5, 3)(run.step(20))
        assert run_tool(run.folder, tmp_path / "out", "--dtype", "float32") == 0
        assert_same_bits(tensors_in(tmp_path / "out"), run.weights[20])

    def test_a_missing_manifest_needs_a_word(
        self, copied: Callable[[], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = copied()
        (run.step(20) / MANIFEST).unlink()
        assert run_tool(run.step(20), tmp_path / "out") == 2
        told = capsys.readouterr().err
        assert "must have a digest manifest" in told and "--unverified" in told
        words = ["--unverified", "--dtype", "float32"]
        assert run_tool(run.step(20), tmp_path / "out", *words) == 0
        assert_same_bits(tensors_in(tmp_path / "out"), run.weights[20])
        # A run stands for its newest step that has one.
        assert run_tool(run.folder, tmp_path / "newest", "--dtype", "float32") == 0
        assert_same_bits(tensors_in(tmp_path / "newest"), run.weights[10])

    @pytest.mark.parametrize("file", ["params/model.norm.weight/0", "params/model.norm.weight/.zarray"])
    @pytest.mark.parametrize("content", [None, b"\0" * 7])
    def test_unverified_files_that_cannot_be_read_are_a_problem(
        self,
        file: str,
        content: bytes | None,
        copied: Callable[[], Run],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """A zarr reader would take zeros for a chunk that is missing."""
        run = copied()
        (run.step(20) / MANIFEST).unlink()
        (run.step(20) / file).unlink()
        if content is not None:
            (run.step(20) / file).write_bytes(content)
        assert run_tool(run.step(20), tmp_path / "out", "--unverified") == 2
        assert "SOURCE=" in capsys.readouterr().err and names_in(tmp_path) == ["run"]


@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_step_that_orbax_wrote_by_itself(copied: Callable[[], Run], ocdbt: bool, tmp_path: Path) -> None:
    """Compressed, and with OCDBT many arrays in one file: read by tensorstore."""
    run = copied()
    step = run.step(20)
    shutil.rmtree(step / "params")
    (step / MANIFEST).unlink()
    arrays = {name: jax.numpy.asarray(tensor.numpy()) for name, tensor in run.weights[20].items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as orbax:
        orbax.save(step / "params", args=ocp.args.PyTreeSave(arrays))
    assert run_tool(step, tmp_path / "out", "--dtype", "float32", "--unverified") == 0
    assert_same_bits(tensors_in(tmp_path / "out"), run.weights[20])


def test_a_step_of_another_model_is_refused(
    copied: Callable[[], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied()
    (run.step(20) / MANIFEST).unlink()
    shutil.rmtree(run.step(20) / "params")
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(run.step(20) / "params", {"model.norm.weight": np.ones(47, np.float32)})
    assert run_tool(run.step(20), tmp_path / "out", "--unverified") == 2
    told = capsys.readouterr().err
    assert "params/model.norm.weight must be [48] float32 as in the model's config" in told
    assert "checkpoint has [47] float32" in told and "checkpoint has nothing" in told


class TestOptions:
    def test_bad_ones_are_listed_together(self, tmp_path: Path) -> None:
        words = ["--dtype", "bloat16", "--max-shard-gb", "-1", "--verify=al"]
        with pytest.raises(ProblemsError) as caught:
            convert_ckpt.check(convert_ckpt.parse(["x", str(tmp_path / "out"), *words]))
        parts = [(p.setting, p.value, p.rule, p.other, p.fix) for p in caught.value.problems]
        known = "known: bfloat16, float16, float32, float64"
        assert parts == [
            ("--dtype", "bloat16", "is not a known weight format", known, "'bfloat16' (did you mean it?)"),
            ("--verify", "al", "is not a known level", "known: all, digests", "'all' (did you mean it?)"),
            ("--max-shard-gb", "-1", "must be a number above 0", "it is the largest file in GB", "5"),
        ]

    @pytest.mark.parametrize("size", ["0", "nan", "inf", "five"])
    def test_sizes_that_are_none(self, size: str) -> None:
        with pytest.raises(ProblemsError, match="--max-shard-gb"):
            convert_ckpt.check(convert_ckpt.parse(["x", "y", "--max-shard-gb", size]))

    def test_a_bare_verify_takes_no_word(self) -> None:
        args = convert_ckpt.parse(["--verify", "x", "y"])
        assert (args.verify, args.source, args.out) == ("all", "x", Path("y"))

    def test_no_traceback(self, tmp_path: Path) -> None:
        command = [sys.executable, "tools/convert_ckpt.py", "none", str(tmp_path / "out"), "--dtype", "int8"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("convert_ckpt: 1 problem:\n  - --dtype=int8: ")


class TestPlaces:
    def test_bad_folders(self, shared_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder, out, none = shared_run.folder, tmp_path / "out", tmp_path / "none"
        assert run_tool(none, out) == 2
        assert f"SOURCE={none}: must be a folder or a hub id (no such folder" in capsys.readouterr().err
        none.mkdir()
        assert run_tool(none, out) == 2
        rule = "must be a step, a run, or a folder with config.json and safetensors (it holds nothing)"
        assert f"SOURCE={none}: {rule}" in capsys.readouterr().err
        assert run_tool(folder, folder) == 2
        assert f"OUT={folder}: must not exist yet" in capsys.readouterr().err
        assert run_tool(folder, out, "--assets", tmp_path / "missing") == 2
        assert f"assets={tmp_path / 'missing'}: " in capsys.readouterr().err
        assert names_in(tmp_path) == ["none"]

    def test_a_step_is_not_written_into(
        self, copied: Callable[[], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = copied()
        assert run_tool(run.folder, run.step(10) / "out") == 2
        assert "must lie outside of every checkpoint step" in capsys.readouterr().err
        assert run_tool(run.step(10), tmp_path / "out") == 0

    def test_overwrite_replaces_a_model_folder_and_nothing_else(
        self, copied: Callable[[], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run, out = copied(), tmp_path / "out"
        assert run_tool(run.folder, out, "--from-step", "10", "--max-shard-gb", "2e-5") == 0
        assert run_tool(run.folder, out) == 2
        assert run_tool(run.folder, out, "--overwrite", "--dtype", "float32") == 0
        assert_same_bits(tensors_in(out), run.weights[20])
        capsys.readouterr()
        for place in (run.folder, run.folder / "checkpoints", run.folder / "assets", tmp_path):
            assert run_tool(run.folder, place, "--overwrite") == 2
            assert f"OUT={place}: must not be replaced by what is read from it" in capsys.readouterr().err
