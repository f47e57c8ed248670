"""A checkpoint's files may be anyone's: links that pass, and code that never runs."""

from __future__ import annotations

import ast
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tptrain
from tests.weights.bad_input import SHARDED, load
from tests.weights.small_llama import read_config, saved_model, saved_table, small_config, small_tokenizer
from tptrain.config.schema import ModelSection
from tptrain.data.tokenizer import load_tokenizer
from tptrain.errors import ProblemsError
from tptrain.untrusted import MAX_JSON_DEPTH, read_json
from tptrain.weights import SafetensorsSource, collect_assets, require_tokenizer


def hub_snapshot(tmp_path: Path, shared: bool, inside: str = ".") -> Path:
    """A checkpoint as the hub's cache holds it: links to blobs, which may be links to shared ones."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--llama" / "snapshots" / ("0" * 40)
    blobs = snapshot.parent.parent / "blobs"
    saved_model(tmp_path / "plain", max_shard_size=SHARDED)
    small_tokenizer().save_pretrained(tmp_path / "plain")
    (snapshot / inside).mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        blob = blobs / f"{number:040x}"
        if shared and path.suffix == ".safetensors":
            store = cache / "blobs" / "ab" / f"ab{number:062x}"
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, store)
            blob.symlink_to(Path("../../blobs/ab") / store.name)
        else:
            shutil.move(path, blob)
        up = "../" * len(Path(inside).parts)
        (snapshot / inside / path.name).symlink_to(f"{up}../../blobs/{blob.name}")
    return snapshot / inside


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("inside", [".", "sub"])
def test_the_hubs_cache_is_read_by_its_path(tmp_path: Path, shared: bool, inside: str) -> None:
    folder = hub_snapshot(tmp_path, shared, inside)
    assert all(path.is_symlink() for path in folder.iterdir())
    assert load(folder).folder == folder
    out = collect_assets(tmp_path / "assets", read_config(folder), small_tokenizer(), folder, folder)
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_hub_id_is_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = hub_snapshot(tmp_path, shared=True)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert SafetensorsSource("some/llama", saved_table(snapshot)).folder == snapshot


def test_links_inside_the_folder_and_to_the_folder_pass(tmp_path: Path) -> None:
    saved_model(tmp_path / "real", max_shard_size=SHARDED)
    (tmp_path / "real" / "data").mkdir()
    for path in (tmp_path / "real").glob("model-*.safetensors"):
        path.rename(path.parent / "data" / path.name)
        path.symlink_to(Path("data") / path.name)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    load(tmp_path / "link")


def test_json_may_be_as_deep_as_the_limit(tmp_path: Path) -> None:
    for levels, value in ((MAX_JSON_DEPTH - 1, "1"), (MAX_JSON_DEPTH - 2, "[]")):
        (tmp_path / "a.json").write_text('{"a": ' + "[" * levels + value + "]" * levels + "}")
        assert "a" in read_json(tmp_path / "a.json", "a")
    (tmp_path / "a.json").write_text('{"a": ' + "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH + "}")
    with pytest.raises(ProblemsError, match="levels deep"):
        read_json(tmp_path / "a.json", "a")


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for path in Path(tptrain.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def test_no_call_trusts_remote_code_and_nothing_is_unpickled() -> None:
    """transformers runs a checkpoint's Python files only when told to; torch.load may run a pickle's code."""
    seen = set()
    for path, node in sources():
        seen.add(path)
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code", path
        if isinstance(node, ast.Constant):
            assert node.value != "trust_remote_code", path
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), path
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "cloudpickle", "dill", "shelve", "joblib"}, path
    assert len(seen) > 50


EVIL = """
from pathlib import Path
Path({sentinel!r}).write_text("ran")
from transformers import LlamaConfig, PreTrainedTokenizerFast
class Tokenizer(PreTrainedTokenizerFast): pass
class Config(LlamaConfig): model_type = "evil"
"""


def checkpoint_with_code(folder: Path, sentinel: Path, own_model_type: bool) -> None:
    """A good tokenizer whose settings say that it needs evil.py, which leaves a mark when it is run."""
    small_tokenizer().save_pretrained(folder)
    small_config().save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(sentinel=str(sentinel)))
    own: dict[str, Any] = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    changes = {
        "tokenizer_config.json": {"auto_map": own, "tokenizer_class": "EvilTokenizer"},
        "config.json": {"auto_map": own, **({"model_type": "evil"} if own_model_type else {})},
    }
    for name, change in changes.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **change}))


@pytest.mark.parametrize("own_model_type", [False, True])
def test_loading_a_tokenizer_does_not_run_the_checkpoints_code(
    tmp_path: Path, own_model_type: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sentinel = tmp_path / "evil", tmp_path / "sentinel"
    checkpoint_with_code(folder, sentinel, own_model_type)
    answers = io.StringIO("y\n" * 9)  # transformers asks there whether to run the code
    monkeypatch.setattr("sys.stdin", answers)
    with pytest.raises(ProblemsError, match="code"):
        load_tokenizer(ModelSection(tokenizer=str(folder)))
    with pytest.raises(ProblemsError, match="must not need code of its own"):
        require_tokenizer(folder, "model.tokenizer")
    assert not sentinel.exists()


def test_code_for_the_model_alone_is_ignored(tmp_path: Path) -> None:
    """This package has models of its own; an export must not name code that is not in it."""
    saved_model(tmp_path / "in")
    small_tokenizer().save_pretrained(tmp_path / "in")
    config = {**read_config(tmp_path / "in"), "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    load(tmp_path / "in")
    out = collect_assets(tmp_path / "assets", config, small_tokenizer(), tmp_path / "in", tmp_path / "in")
    assert "auto_map" not in read_config(out)
