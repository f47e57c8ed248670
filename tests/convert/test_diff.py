"""`diff`: nothing between what is equal, and every kind of difference by name and number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.convert.models import Run, Tensors, random_tensors, run_tool, tensors_in, write_model, write_run
from tests.small import DictSource
from tests.weights.small_llama import rewrite
from tools.bench.damages import DAMAGES
from tptrain.ckpt.digests import MANIFEST
from tptrain.ckpt.importing import write_step
from tptrain.ckpt.steps import read_run
from tptrain.convert.differences import TensorDifference, tensor_difference

NORM = "model.layers.1.input_layernorm.weight"


def told(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> list[str]:
    assert run_tool("diff", *words) == code
    return capsys.readouterr().out.splitlines()


def flip_one_bit(folder: Path, name: str, bit: int = 0) -> tuple[float, float]:
    """Flip one bit in the middle of a float32 tensor of a folder; returns the values before and after."""
    tensor = tensors_in(folder)[name]
    middle = tensor.view(-1)[tensor.numel() // 2 : tensor.numel() // 2 + 1]
    before = middle.item()
    middle.view(torch.int32).bitwise_xor_(1 << bit)
    rewrite(folder, {name: tensor})
    return before, middle.item()


class TestEqual:
    def test_a_step_and_its_export(
        self, shared_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Their moments and run facts are no difference, nor is the spelling of the config."""
        assert run_tool(shared_run.folder, tmp_path / "out", "--dtype", "float32") == 0
        for pair in ((shared_run.folder, tmp_path / "out"), (tmp_path / "out", shared_run.step(20))):
            capsys.readouterr()
            assert told(capsys, 0, *pair)[2:] == ["equal bit for bit: 30 tensors", "no differences"]

    def test_a_step_and_itself(self, shared_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        lines = told(capsys, 0, shared_run.step(10), shared_run.step(10))
        assert lines[:3] == [
            f"A: {shared_run.step(10)}",
            f"B: {shared_run.step(10)}",
            "equal bit for bit: 90 tensors",
        ]


class TestValues:
    @pytest.mark.parametrize("bit", [0, 31])
    def test_one_bit_is_found(self, bit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one, other = write_model(tmp_path / "a"), write_model(tmp_path / "b")
        before, after = flip_one_bit(other, NORM, bit)
        lines = told(capsys, 1, one, other)
        assert lines[2:] == [
            "equal bit for bit: 29 tensors",
            "other values: 1",
            f"  {NORM}: 1 of 48 elements, max|d| {abs(before - after):.6g}",
        ]

    def test_one_bit_of_a_moment_is_found_between_steps(
        self, shared_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = shared_run.copy(tmp_path / "run")
        moments = {name: random_tensors(run.table, 7 * 20 + i) for i, name in enumerate(("mu", "nu"))}
        moments["nu"]["lm_head.weight"][7, 11] += 0.25
        rewrite_step(run, moments)
        assert "  nu/lm_head.weight: 1 of 6,288 elements, max|d| 0.25" in told(
            capsys, 1, shared_run.step(20), run.step(20)
        )

    @pytest.mark.parametrize("rows", [(1, 5), (3, 7), (40, 1)])
    def test_blocks_need_not_agree(self, rows: tuple[int, int]) -> None:
        one = torch.randn(40, 9, generator=torch.Generator().manual_seed(8))
        other = one.clone()
        other[3, 4] += 2.0
        other[39, 8] = -other[39, 8]
        largest = (one - other).abs().max().item()
        found = tensor_difference("w", iter(one.split(rows[0])), iter(other.split(rows[1])))
        assert found == TensorDifference("w", 2, 360, largest)
        assert tensor_difference("w", iter(one.split(rows[0])), iter(one.split(rows[1]))) is None

    def test_zeros_of_two_signs_and_nan(self) -> None:
        zero, nan = torch.zeros(4), torch.tensor([0.0, float("nan"), 0.0, 1.0])
        signed = tensor_difference("w", iter([zero]), iter([-zero]))
        assert signed == TensorDifference("w", 4, 4, 0.0)
        found = tensor_difference("w", iter(zero.split(1)), iter([nan]))
        assert found is not None and found.count == 2 and found.largest != found.largest
        assert tensor_difference("w", iter([nan]), iter([nan.clone()])) is None


class TestForms:
    def test_dtypes_are_compared_by_value(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one, other = write_model(tmp_path / "a", "bfloat16"), write_model(tmp_path / "b", "bfloat16")
        wide = {name: tensor.float() for name, tensor in tensors_in(one).items()}
        wide["lm_head.weight"][1, 2] += 1.0
        rewrite(other, wide)
        lines = told(capsys, 1, one, other)
        assert lines[2:4] == ["equal bit for bit: 0 tensors", "other shape or dtype: 30"]
        assert "  model.layers.0.self_attn.k_proj.weight: [20, 48] bfloat16 / [20, 48] float32" in lines
        assert lines[-2:] == ["other values: 1", "  lm_head.weight: 1 of 6,288 elements, max|d| 1"]

    def test_names_and_shapes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one, other = write_model(tmp_path / "a"), write_model(tmp_path / "b")
        rewrite(one, {"extra.weight": torch.ones(3)})
        rewrite(other, {NORM: torch.ones(47), "model.norm.weight": None})
        lines = told(capsys, 1, one, other)
        assert lines[2:] == [
            "equal bit for bit: 28 tensors",
            "only in A: 2",
            "  extra.weight",
            "  model.norm.weight",
            "other shape or dtype: 1",
            f"  {NORM}: [48] float32 / [47] float32",
        ]
        assert "only in B: 2" in told(capsys, 1, other, one)

    def test_tied_and_untied(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lines = told(capsys, 1, write_model(tmp_path / "a", tied=True), write_model(tmp_path / "b"))
        assert "  lm_head.weight" in lines and "  config.tie_word_embeddings: True / False" in lines


class TestFacts:
    def test_two_steps_of_a_run(self, shared_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        lines = told(capsys, 1, shared_run.step(10), shared_run.step(20))
        assert "other values: 90" in lines and "  and 70 more" in lines
        at = lines.index("other facts: 2")
        assert lines[at + 1 :] == ["  run.cursor: 80 / 160", "  run.step: 10 / 20"]

    def test_two_runs(self, shared_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        other = write_run(tmp_path / "other", tied=True, steps=(20,))
        lines = told(capsys, 1, shared_run.folder, other.folder)
        assert "  mu/lm_head.weight" in lines and "  config.tie_word_embeddings: False / True" in lines

    def test_fields_of_the_config(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one, other = write_model(tmp_path / "a"), write_model(tmp_path / "b")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5, "mine": [1]}))
        (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
        lines = told(capsys, 1, one, other)
        assert lines[2:] == [
            "equal bit for bit: 30 tensors",
            "other facts: 3",
            "  config.eos_token_id: 1 / [1, 7]",
            "  config.mine: None / [1]",
            "  config.rms_norm_eps: 1e-06 / 1e-05",
        ]


class TestRefused:
    def test_a_damaged_step(
        self, copied: Callable[[], Run], shared_run: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Also where the damage is found only after its values have been compared."""
        run = copied()
        file = DAMAGES["last bit of a moment"](run.step(20))
        assert run_tool("diff", shared_run.step(20), run.step(20)) == 2
        message = capsys.readouterr().err
        assert f"B={run.step(20)}: must hold what was saved" in message and file in message

    def test_no_manifest(
        self, copied: Callable[[], Run], shared_run: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = copied()
        (run.step(20) / MANIFEST).unlink()
        assert run_tool("diff", run.step(20), shared_run.step(20)) == 2
        assert f"A={run.step(20)}: must have a digest manifest" in capsys.readouterr().err
        assert told(capsys, 0, run.step(20), shared_run.step(20), "--unverified")[-1] == "no differences"

    def test_nothing_there(self, shared_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty").mkdir()
        assert run_tool("diff", shared_run.folder, tmp_path / "empty") == 2
        assert "must be a step, a run, or a folder with config.json" in capsys.readouterr().err

    def test_numbers_that_are_no_floats(
        self, shared_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_model(tmp_path / "source")
        rewrite(source, {"model.norm.weight": torch.ones(48, dtype=torch.int8)})
        assert run_tool("diff", shared_run.folder, source) == 2
        assert "1 are not, such as model.norm.weight I8" in capsys.readouterr().err


def rewrite_step(run: Run, moments: dict[str, Tensors]) -> None:
    """Write step 20 of a run anew, with the same weights and facts but other moments."""
    facts = read_run(run.step(20))
    shutil.rmtree(run.step(20))
    sources = {name: DictSource(tensors) for name, tensors in moments.items()}
    write_step(run.step(20), run.table, DictSource(run.weights[20]), facts, moments=sources)
