"""From a model folder to a checkpoint and back: bit-equal, complete, and readable by plain JAX."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

from tests.convert.models import (
    Run,
    assert_same_bits,
    names_in,
    run_tool,
    tensors_in,
    write_model,
)
from tests.weights.small_llama import LLAMA3_ROPE, rewrite
from tptrain.ckpt.reading import StepReader
from tptrain.convert.from_hf import STEP
from tptrain.family import facts_from_config, parameter_table, stored_rows

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def edit_json(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = {**(json.loads(path.read_text()) if path.exists() else {}), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def stored_in(out: Path) -> dict[str, torch.Tensor]:
    """The weights of a converted checkpoint, as they are on disk."""
    reader = StepReader(out / STEP)
    rows = stored_rows(parameter_table(facts_from_config(reader.run["hf_config"])))
    return {row.name: torch.cat(list(reader.read_blocks(row))) for row in rows}


class TestRoundTrip:
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize(
        ("dtype", "storage"),
        [
            ("bfloat16", None),
            ("float16", None),
            ("float32", None),
            ("bfloat16", "bfloat16"),
            ("float16", "float16"),
        ],
    )
    def test_every_tensor_comes_back_bit_for_bit(
        self, dtype: str, storage: str | None, tied: bool, tmp_path: Path
    ) -> None:
        source, out, back = write_model(tmp_path / "source", dtype, tied), tmp_path / "out", tmp_path / "back"
        assert run_tool(source, out, *(["--dtype", storage] if storage else [])) == 0
        stored = stored_in(out)
        assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, storage or "float32")}
        assert run_tool(out, back, "--dtype", dtype) == 0
        assert_same_bits(tensors_in(back), tensors_in(source))
        assert run_tool("diff", source, back) == 0

    def test_files_of_any_number_and_rope(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "source", "bfloat16", rope=LLAMA3_ROPE, max_shard_size="20kB")
        assert len(list(source.glob("*.safetensors"))) > 3
        assert run_tool(source, tmp_path / "out") == 0
        assert run_tool(tmp_path / "out" / STEP, tmp_path / "back") == 0
        assert_same_bits(tensors_in(tmp_path / "back"), tensors_in(source))
        assert run_tool("diff", source, tmp_path / "back") == 0

    def test_mixed_dtypes_keep_their_values(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "source", "bfloat16")
        norm = torch.randn(48, generator=torch.Generator().manual_seed(2))
        rewrite(source, {"model.norm.weight": norm, "lm_head.weight": torch.randn(131, 48).half()})
        assert run_tool(source, tmp_path / "out") == 0
        exact = {name: tensor.float() for name, tensor in tensors_in(source).items()}
        assert_same_bits(stored_in(tmp_path / "out"), exact)

    def test_the_head_alone_is_stored_of_a_tied_pair(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "source", tied=True)
        head = tensors_in(source)["model.embed_tokens.weight"]
        rewrite(source, {"model.embed_tokens.weight": None, "lm_head.weight": head})
        assert run_tool(source, tmp_path / "out") == 0
        assert torch.equal(stored_in(tmp_path / "out")["model.embed_tokens.weight"], head)
        assert run_tool("diff", source, tmp_path / "out") == 0


class TestLayout:
    def test_a_folder_like_a_runs(self, tmp_path: Path) -> None:
        source, out = write_model(tmp_path / "source", "bfloat16"), tmp_path / "out"
        assert run_tool(source, out) == 0
        assert names_in(tmp_path) == ["out", "source"]
        assert names_in(out) == ["assets", "checkpoints"] and names_in(out / "checkpoints") == ["0"]
        assert {"params", "run", "manifest.json"} <= set(names_in(out / STEP))
        assert not {"mu", "nu"} & set(names_in(out / STEP))
        for name in ("config.json", "generation_config.json", *TOKENIZER):
            assert (out / "assets" / name).read_bytes() == (source / name).read_bytes(), name
        run = StepReader(out / STEP).run
        assert {name: run[name] for name in ("step", "cursor", "seeds", "recipe", "mesh")} == {
            **{"step": 0, "cursor": 0},
            **{"seeds": {}, "recipe": {}, "mesh": {}},
        }
        assert run["source"] == {"name": str(source), "dtypes": ["bfloat16"]}
        assert {"tptrain", "orbax-checkpoint", "transformers"} <= set(run["versions"])
        config = run["hf_config"]
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 20000.0
        assert (config["head_dim"], config["eos_token_id"], config["dtype"]) == (10, 1, "float32")

    @pytest.mark.parametrize("given", [True, False])
    def test_token_ids_that_the_config_alone_names_are_kept(self, given: bool, tmp_path: Path) -> None:
        source = write_model(tmp_path / "source")
        edit_json(source / "config.json", pad_token_id=2, eos_token_id=1)
        generation = source / "generation_config.json"
        generation.unlink()
        if given:
            edit_json(generation, eos_token_id=[1, 5], temperature=0.5)
        assert run_tool(source, tmp_path / "out") == 0 and run_tool(tmp_path / "out", tmp_path / "back") == 0
        back = json.loads((tmp_path / "back" / "config.json").read_text())
        assert (back["pad_token_id"], back["bos_token_id"]) == (2, 0)
        assert back["eos_token_id"] == ([1, 5] if given else 1)
        kept = json.loads((tmp_path / "back" / "generation_config.json").read_text())
        assert kept["pad_token_id"] == 2 and kept.get("temperature") == (0.5 if given else None)

    def test_no_tokenizer_is_told_in_a_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source, out = write_model(tmp_path / "source", tokenizer=False), tmp_path / "out"
        assert run_tool(source, out) == 0
        assert run_tool(out, tmp_path / "back", "--dtype", "float32") == 0
        told = capsys.readouterr().out.splitlines()
        assert [line for line in told if "No tokenizer" in line] == [told[1], told[3]] and len(told) == 4
        assert names_in(out / "assets") == ["config.json", "generation_config.json"]
        assert_same_bits(tensors_in(tmp_path / "back"), tensors_in(source))
        config = json.loads((tmp_path / "back" / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 2)


class TestDtypes:
    def test_float64_must_be_asked_for(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = write_model(tmp_path / "source")
        wide = torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        rewrite(source, {"model.norm.weight": wide})
        assert run_tool(source, tmp_path / "out") == 2
        told = capsys.readouterr().err
        assert "--dtype=not given: must be a dtype that holds every value, or be asked for" in told
        assert "1 tensors are float64, such as model.norm.weight" in told
        assert names_in(tmp_path) == ["source"]
        assert run_tool(source, tmp_path / "wide", "--dtype", "float64") == 0
        assert torch.equal(stored_in(tmp_path / "wide")["model.norm.weight"], wide)
        assert run_tool(source, tmp_path / "rounded", "--dtype", "float32") == 0
        assert torch.equal(stored_in(tmp_path / "rounded")["model.norm.weight"], wide.float())

    def test_rounding_is_done_when_asked_for(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "source")
        assert run_tool(source, tmp_path / "out", "--dtype", "bfloat16", "--verify=digests") == 0
        expected = {name: tensor.bfloat16() for name, tensor in tensors_in(source).items()}
        assert_same_bits(stored_in(tmp_path / "out"), expected)

    def test_a_value_that_does_not_fit_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_model(tmp_path / "source")
        rewrite(source, {"model.norm.weight": torch.linspace(-70000.0, 1.0, 48)})
        assert run_tool(source, tmp_path / "out", "--dtype", "float16") == 2
        message = "--dtype=float16: must be able to hold every weight (model.norm.weight has 70000"
        assert message in capsys.readouterr().err and names_in(tmp_path) == ["source"]


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def quantized(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})


def another_family(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="lama")


def a_tensor_missing(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": None})


def a_file_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def a_tokenizer_with_code(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_config, "must be a step, a run, or a folder with config.json and safetensors (it holds "),
        (quantized, "model.config.quantization_config=gptq: is not supported: weights must be plain numbers"),
        (another_family, "model.config.model_type=lama: is not a known model family"),
        (a_tensor_missing, "must hold every tensor of the model (1 missing of 30: model.norm.weight)"),
        (a_file_cut, "must be a complete safetensors file"),
        (a_tokenizer_with_code, "must not need code of its own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_sources(
    spoil: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "source")
    spoil(source)
    assert run_tool(source, tmp_path / "out") == 2
    assert message in capsys.readouterr().err and names_in(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from-step", "latest"], "--from-step=latest: needs a run to choose a step of"),
        (["--max-shard-gb", "2"], "--max-shard-gb=2.0: belongs to the other direction"),
        (["--assets", "x"], "--assets=x: belongs to the other direction"),
        (["--unverified"], "--unverified=True: belongs to the other direction"),
    ],
)
def test_options_of_the_other_direction(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "source")
    assert run_tool(source, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err and names_in(tmp_path) == ["source"]


class TestOverwrite:
    def test_its_own_folder_is_replaced(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first, second = write_model(tmp_path / "a", "bfloat16"), write_model(tmp_path / "b", tied=True)
        out = tmp_path / "out"
        assert run_tool(first, out) == 0
        assert run_tool(second, out) == 2
        assert f"OUT={out}: must not exist yet (it exists)" in capsys.readouterr().err
        assert_same_bits(stored_in(out), {name: t.float() for name, t in tensors_in(first).items()})
        assert run_tool(second, out, "--overwrite") == 0
        assert_same_bits(stored_in(out), tensors_in(second))
        assert names_in(tmp_path) == ["a", "b", "out"]

    def test_nothing_else_is(
        self, copied: Callable[[], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source, run = write_model(tmp_path / "source"), copied()
        shutil.copytree(source, tmp_path / "model")
        (tmp_path / "file").write_text("mine")
        for place in (run.folder, tmp_path / "model", tmp_path / "file"):
            assert run_tool(source, place, "--overwrite") == 2
            assert f"OUT={place}: " in capsys.readouterr().err
        assert run_tool(source, source, "--overwrite") == 2
        assert "must not be replaced by what is read from it" in capsys.readouterr().err
        assert_same_bits(tensors_in(source), tensors_in(tmp_path / "model"))
        assert run.step(10).is_dir() and (tmp_path / "file").read_text() == "mine"


def test_plain_jax_reads_it(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "bfloat16")
    assert run_tool(source, tmp_path / "out", "--dtype", "bfloat16") == 0
    folder = (tmp_path / "out" / STEP / "params").absolute()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for name, a in tree.items()}
        arrays = reader.restore(folder, wanted)
    expected = tensors_in(source)
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        assert array.dtype == jax.numpy.bfloat16
        assert np.array_equal(np.asarray(array.astype("float32")), expected[name].float().numpy()), name
