"""--verify passes on what was just written and on nothing else, and does not run out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.convert.models import Run, run_tool, tensors_in, write_model
from tptrain.convert import VerificationError, verification
from tptrain.convert.from_hf import STEP, FolderModel, open_folder
from tptrain.convert.verification import (
    LogitGap,
    available_bytes,
    memory_problems,
    tensor_digests,
    verify_digests,
    verify_logits,
)
from tptrain.export import StepModel, export_model, open_step
from tptrain.family import ParamRow, facts_from_config, parameter_table


def tamper(folder: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change a tensor of a single-file folder in place."""
    tensors = tensors_in(folder)
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def exported(shared_run: Run, tmp_path: Path) -> tuple[StepModel, Path]:
    step = open_step(shared_run.step(20))
    return step, export_model(step, tmp_path / "out", "bfloat16")


def folder_model(folder: Path) -> FolderModel:
    return open_folder(folder, str(folder))


class TestTool:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
    def test_passes_and_gives_the_numbers(
        self, dtype: str, shared_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run_tool(shared_run.folder, tmp_path / "out", "--dtype", dtype, "--verify") == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"verified: 30 tensors read back, each with the digest of its source in {dtype}" in lines
        # 64 positions are all that the model has.
        logits = [line for line in lines if line.startswith("verified: logits equal transformers'")]
        assert [line.split()[4] for line in logits] == ["7", "64"] and "max|d| " in logits[1]

    def test_digests_alone_run_no_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = write_model(tmp_path / "source", "bfloat16")
        assert run_tool(source, tmp_path / "out", "--verify=digests") == 0
        told = capsys.readouterr().out
        assert "30 tensors read back" in told and "logits" not in told

    @pytest.mark.parametrize("to_checkpoint", [True, False])
    def test_too_large_a_model_is_refused_before_anything_is_written(
        self,
        to_checkpoint: bool,
        shared_run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        meminfo = tmp_path / "meminfo"
        meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable: 512 kB\n")
        monkeypatch.setattr(verification, "_MEMINFO", meminfo)
        source = write_model(tmp_path / "source") if to_checkpoint else shared_run.folder
        assert run_tool(source, tmp_path / "out", "--verify") == 2
        told = capsys.readouterr().err
        needed = "needs 564.10 kB of memory for the logits: the model twice in float32"
        assert f"--verify=all: {needed} (available: 524.29 kB); use --verify=digests" in told
        assert not (tmp_path / "out").exists()
        assert run_tool(source, tmp_path / "out", "--verify=digests") == 0

    def test_a_long_prompt_has_at_least_500_tokens(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "source")
        model = open_folder(source, "x")
        facts = facts_from_config({**model.config, "max_position_embeddings": 4096})
        long = verification._prompt(facts, verification.PROMPT_TOKENS[1])
        assert long.shape[1] >= 500 and long.min() >= 0 and 120 < long.max() < facts.vocab_size
        assert torch.equal(long, verification._prompt(facts, verification.PROMPT_TOKENS[1]))


class TestTampered:
    """The export is changed after it was written, as a bad disk or a bug would."""

    def test_one_bit_fails_the_digests(self, exported: tuple[StepModel, Path]) -> None:
        step, out = exported
        assert verify_digests(step, folder_model(out), "bfloat16") == 30
        tamper(out, "model.layers.1.mlp.up_proj.weight", lambda t: t.view(torch.int16)[3, 4].bitwise_xor_(1))
        with pytest.raises(VerificationError, match=r"1 of 30 tensors differ .*layers\.1\.mlp\.up_proj"):
            verify_digests(step, folder_model(out), "bfloat16")

    def test_two_tensors_exchanged_fail_the_digests(self, exported: tuple[StepModel, Path]) -> None:
        step, out = exported
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
        other = tensors_in(out)[names[1]]
        tamper(out, names[0], lambda tensor: tensor.copy_(other))
        with pytest.raises(VerificationError, match=r"1 of 30 tensors differ"):
            verify_digests(step, folder_model(out), "bfloat16")

    def test_a_changed_weight_fails_the_logits(self, exported: tuple[StepModel, Path]) -> None:
        step, out = exported
        assert all(gap.passes for gap in verify_logits(step, out, "bfloat16"))
        tamper(out, "model.layers.2.self_attn.q_proj.weight", lambda tensor: tensor[5].mul_(1.5))
        with pytest.raises(VerificationError, match=r"7 tokens: max\|d\| \S+, max\|logit\| \S+, ratio"):
            verify_logits(step, out, "bfloat16")

    def test_a_changed_config_fails_the_logits(self, exported: tuple[StepModel, Path]) -> None:
        """Weights alone would not show it."""
        step, out = exported
        config = out / "config.json"
        config.write_text(config.read_text().replace("20000.0", "10000.0"))
        with pytest.raises(VerificationError, match="differ by more than 1e-05"):
            verify_logits(step, out, "bfloat16")

    def test_the_tool_exits_with_1(
        self,
        shared_run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from tptrain.convert import conversion

        def export_and_tamper(*arguments: object, **options: object) -> Path:
            out = export_model(*arguments, **options)  # type: ignore[arg-type]
            tamper(out, "model.norm.weight", lambda tensor: tensor[:1].neg_())
            return out

        monkeypatch.setattr(conversion, "export_model", export_and_tamper)
        assert run_tool(shared_run.folder, tmp_path / "out", "--verify") == 1
        assert "1 of 30 tensors differ in " in capsys.readouterr().err

    def test_a_checkpoint_that_differs_from_its_source(self, tmp_path: Path) -> None:
        source, other = write_model(tmp_path / "source", "bfloat16"), tmp_path / "other"
        assert run_tool(source, tmp_path / "out") == 0
        step = open_step(tmp_path / "out" / STEP)
        assert verify_digests(step, folder_model(source), "float32") == 30
        source.rename(other)
        tamper(other, "lm_head.weight", lambda tensor: tensor[-1, -1:].neg_())
        with pytest.raises(VerificationError, match=r"differ .*: lm_head\.weight"):
            verify_digests(step, folder_model(other), "float32")


class TestNumbers:
    @pytest.mark.parametrize(
        ("difference", "largest", "passes"),
        [(0.0, 3.0, True), (2.9e-5, 3.0, True), (3.1e-5, 3.0, False), (float("nan"), 3.0, False)],
    )
    def test_the_bar(self, difference: float, largest: float, passes: bool) -> None:
        assert LogitGap(7, difference, largest).passes is passes

    def test_memory_is_the_model_twice_in_float32(self) -> None:
        table = [ParamRow("w", (), (1000, 500), (1000, 500)), ParamRow("v", (), (9,), (9,), tied_to="w")]
        assert memory_problems(table, free_bytes=4_000_000) == []
        [problem] = memory_problems(table, free_bytes=3_999_999)
        assert problem.fix == "--verify=digests" and "needs 4.00 MB " in problem.rule
        assert 10**8 < available_bytes() < 10**14

    def test_digests_do_not_depend_on_the_blocks(self) -> None:
        row = ParamRow("w", (), (40, 7), (40, 7))
        values = torch.randn(40, 7, generator=torch.Generator().manual_seed(6))

        def blocks(rows: int) -> Callable[[ParamRow], Iterator[torch.Tensor]]:
            return lambda row: iter(values.split(rows))

        digests = [tensor_digests([row], blocks(rows), "bfloat16") for rows in (1, 6, 40)]
        assert digests[0] == digests[1] == digests[2]
        values[39, 6] += 1
        assert tensor_digests([row], blocks(6), "bfloat16") != digests[0]


def test_a_folder_read_for_verifying_has_the_models_table(tmp_path: Path) -> None:
    model = folder_model(write_model(tmp_path / "source", tied=True))
    assert model.table == parameter_table(facts_from_config(model.config))
    assert set(model.dtypes) == {row.name for row in model.table if row.tied_to is None}
