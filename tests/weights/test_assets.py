"""The assets folder: tokenizer files byte for byte, or saved so that both transformers majors load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from tests.weights.small_llama import read_config, saved_model, small_tokenizer
from tptrain.errors import ProblemsError
from tptrain.hf_files import tokenizer_files
from tptrain.weights import collect_assets


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with weights, stop tokens and a tokenizer whose files are laid out in an unusual way."""
    folder = tmp_path / "checkpoint"
    saved_model(folder)
    small_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_bytes(b"{{ 1 }}\r\n")
    generation = {"eos_token_id": [1, 90], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def generation(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    return content


def test_a_checkpoints_own_tokenizer_is_copied_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    out = collect_assets(
        tmp_path / "assets", read_config(checkpoint), small_tokenizer(), checkpoint, checkpoint, stops=(91,)
    )
    names = tokenizer_files(checkpoint)
    assert Path("additional_chat_templates/tools.jinja") in names and Path("tokenizer.json") in names
    assert tokenizer_files(out) == names
    assert all((out / name).read_bytes() == (checkpoint / name).read_bytes() for name in names)
    assert not list(out.glob("*.safetensors"))
    assert generation(out)["eos_token_id"] == [1, 90, 91] == read_config(out)["eos_token_id"]
    assert generation(out)["temperature"] == 0.6
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1, 90, 91]
    assert AutoConfig.from_pretrained(out).eos_token_id == [1, 90, 91]


def test_ids_of_another_tokenizer_are_not_taken_over(checkpoint: Path, tmp_path: Path) -> None:
    """id 90 ends an answer in the checkpoint's tokenizer; in another one it is an ordinary token."""
    other = tmp_path / "other"
    small_tokenizer().save_pretrained(other)
    hf_config = {**read_config(checkpoint), "eos_token_id": 77, "bos_token_id": 78}
    out = collect_assets(tmp_path / "assets", hf_config, small_tokenizer(), other, checkpoint)
    assert generation(out)["eos_token_id"] == [1]
    assert generation(out)["bos_token_id"] == 0
    assert generation(out)["temperature"] == 0.6
    ids = [read_config(out)[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    assert ids == [0, 1, 2]


def test_a_tokenizer_of_this_run_is_saved_for_both_majors(checkpoint: Path, tmp_path: Path) -> None:
    out = collect_assets(tmp_path / "assets", read_config(checkpoint), small_tokenizer())
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    # transformers 4.57 fails on a list under extra_special_tokens
    assert config["additional_special_tokens"] == ["<turn_end>"] and "extra_special_tokens" not in config
    loaded, text = AutoTokenizer.from_pretrained(out), "hello world, 3 + 4 = 7<turn_end>"
    assert loaded(text)["input_ids"] == small_tokenizer()(text)["input_ids"]
    assert loaded.all_special_tokens == small_tokenizer().all_special_tokens
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<turn_end>"
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)


def test_a_failure_leaves_no_assets(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()

    class Broken:
        bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

        def save_pretrained(self, folder: str) -> None:
            tokenizer.save_pretrained(folder)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        collect_assets(tmp_path / "assets", read_config(checkpoint), Broken())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_assets_are_not_written_over(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    with pytest.raises(ProblemsError, match="must not exist yet"):
        collect_assets(tmp_path / "assets", read_config(checkpoint), small_tokenizer())


def test_a_template_replaces_all_others_and_tokens_join_the_files(checkpoint: Path, tmp_path: Path) -> None:
    """As transformers reads them: no older place of a template wins, no file but the changed ones is new."""
    (checkpoint / "chat_template.json").write_text('{"chat_template": "old"}')
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    listed = {"content": "<turn_end>", "special": True, "lstrip": False, "rstrip": False}
    decoder = {str(small_tokenizer().get_vocab()["<turn_end>"]): {**listed, "single_word": False}}
    kept = {**config, "chat_template": "older", "added_tokens_decoder": decoder}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(kept))
    size = len(small_tokenizer())
    added = {"<b>": size + 1, "<turn_end>": int(next(iter(decoder))), "<a>": size}
    text = "{{ messages[0]['content'] }}<a>\n"
    out = collect_assets(
        tmp_path / "assets",
        read_config(checkpoint),
        small_tokenizer(),
        checkpoint,
        checkpoint,
        added=added,
        chat_template=text,
    )
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.chat_template == text
    assert {token: loaded.get_vocab()[token] for token in added} == added
    assert loaded("hello<a><b>")["input_ids"][-2:] == [size, size + 1]
    assert loaded.decode([size, size + 1], skip_special_tokens=True) == ""
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert set(written["added_tokens_decoder"]) == {*decoder, str(size), str(size + 1)}
    assert {**written, "added_tokens_decoder": 0} == {**config, "added_tokens_decoder": 0}
    assert not (out / "chat_template.json").exists() and not (out / "additional_chat_templates").exists()


def test_tokens_that_are_there_leave_the_bytes_alone(checkpoint: Path, tmp_path: Path) -> None:
    ids = {"<turn_end>": small_tokenizer().get_vocab()["<turn_end>"]}
    out = collect_assets(
        tmp_path / "assets", read_config(checkpoint), small_tokenizer(), checkpoint, checkpoint, added=ids
    )
    for name in tokenizer_files(checkpoint):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
