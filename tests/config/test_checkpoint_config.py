"""Where the config.json of a checkpoint is found: folders, steps of a run, the local hub cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from samples import SMALL_LLAMA, small_recipe

from tptrain.config import ModelSection
from tptrain.config.checkpoint_config import cached_hub_file, find_checkpoint_config, read_config_file
from tptrain.errors import ProblemsError

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _write(path: Path, config: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def _found(pretrained: str | None, environ: dict[str, str] | None = None) -> dict[str, Any] | None:
    recipe = small_recipe(model=ModelSection(pretrained=pretrained))
    return find_checkpoint_config(recipe, environ or {"HF_HOME": "/nowhere"})


def test_no_checkpoint() -> None:
    assert _found(None) is None


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "my" / "ckpt" / "config.json", SMALL_LLAMA)
    assert _found(str(tmp_path / "my" / "ckpt")) == SMALL_LLAMA
    monkeypatch.chdir(tmp_path)
    assert _found("my/ckpt") == SMALL_LLAMA


def test_a_step_of_a_run(tmp_path: Path) -> None:
    _write(tmp_path / "assets" / "config.json", SMALL_LLAMA)
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    assert _found(str(tmp_path / "checkpoints" / "100")) == SMALL_LLAMA


def test_a_step_without_assets(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "100"
    step.mkdir(parents=True)
    with pytest.raises(ProblemsError, match="must be a step of a complete run"):
        _found(str(step))


@pytest.mark.parametrize("gone", ["my/model", "/nowhere/model"])
def test_a_run_that_goes_on_keeps_the_config_of_weights_that_are_gone(tmp_path: Path, gone: str) -> None:
    _write(tmp_path / "run" / "assets" / "config.json", SMALL_LLAMA)

    def found(**changes: Any) -> dict[str, Any] | None:
        asked = {"model": ModelSection(pretrained=gone), "output_dir": str(tmp_path / "run"), **changes}
        return find_checkpoint_config(small_recipe(**asked), {"HF_HOME": "/nowhere"})

    assert found(resume="auto") == found(resume="120") == SMALL_LLAMA
    for changes in ({"resume": "never"}, {"resume": "auto", "output_dir": str(tmp_path / "other")}):
        if gone == "my/model":
            assert found(**changes) is None
        else:
            with pytest.raises(ProblemsError, match="must exist"):
                found(**changes)


def test_weights_that_are_there_count_before_what_a_run_has_kept(tmp_path: Path) -> None:
    _write(tmp_path / "run" / "assets" / "config.json", SMALL_LLAMA)
    _write(tmp_path / "model" / "config.json", {**SMALL_LLAMA, "vocab_size": 515})
    model = ModelSection(pretrained=str(tmp_path / "model"))
    asked = small_recipe(model=model, output_dir=str(tmp_path / "run"), resume="auto")
    found = find_checkpoint_config(asked, {"HF_HOME": "/nowhere"})
    assert found is not None and found["vocab_size"] == 515


def test_a_config_path_may_be_a_folder(tmp_path: Path) -> None:
    _write(tmp_path / "config.json", SMALL_LLAMA)
    for given in (tmp_path, tmp_path / "config.json"):
        assert read_config_file(small_recipe(model=ModelSection(config=str(given)))) == SMALL_LLAMA
    assert read_config_file(small_recipe()) is None
    assert read_config_file(small_recipe(model=ModelSection())) is None


def test_a_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ProblemsError, match=r"must be readable .*not a regular file"):
        _found(str(tmp_path))


def test_a_config_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{\x00}")
    with pytest.raises(ProblemsError, match="not UTF-8 text"):
        _found(str(tmp_path))


def _cache(home: Path, repo: str, with_reference: bool = True, commit: str = _COMMIT) -> None:
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    _write(folder / "snapshots" / _COMMIT / "config.json", SMALL_LLAMA)
    if with_reference:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)


def test_hub_cache_is_read_as_huggingface_hub_reads_it(tmp_path: Path) -> None:
    """The same file, or none, as try_to_load_from_cache finds in a process with the same environment."""
    _cache(tmp_path, "org/model")
    _cache(tmp_path, "gpt-none", commit="f" * 40)
    _cache(tmp_path, "org/unreferenced", with_reference=False)
    repos = ["org/model", "gpt-none", "org/unreferenced", "org/absent"]
    code = (
        "import json, sys\nfrom huggingface_hub import try_to_load_from_cache as find\n"
        "names = ('config.json', 'other.json')\n"
        "print(json.dumps([find(repo, name) for repo in sys.argv[1:] for name in names]))"
    )
    homes = {"HF_HOME": str(tmp_path)}, {"HF_HUB_CACHE": str(tmp_path / "hub")}
    for environ in homes:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
        done = subprocess.run(
            [sys.executable, "-c", code, *repos],
            env={**clean, **environ},
            capture_output=True,
            text=True,
            check=True,
        )
        ours = [
            cached_hub_file(repo, name, environ) for repo in repos for name in ("config.json", "other.json")
        ]
        assert [str(path) if path else None for path in ours] == json.loads(done.stdout)
    assert _found("org/model", homes[0]) == SMALL_LLAMA
    assert _found("org/absent", homes[0]) is None


def test_the_default_place_of_the_hub_cache(tmp_path: Path) -> None:
    _cache(tmp_path / "huggingface", "org/model")
    assert cached_hub_file("org/model", "config.json", {"XDG_CACHE_HOME": str(tmp_path)})
