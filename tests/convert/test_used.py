"""A converted checkpoint in use: trained from, asked, and with no secret in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.convert.models import run_tool, write_model
from tests.small_run import small_recipe
from tptrain.config import DataSection, ExportSection, ModelSection, SaveSection, ScheduleSection
from tptrain.config.planning import plan_recipe
from tptrain.convert.from_hf import STEP
from tptrain.generate.command import answer
from tptrain.train.journal import JOURNAL_FILE, read_journal
from tptrain.train.run import train

ROOT = Path(__file__).resolve().parents[2]
SENTINEL = "hf_sentinelThatMustNotBeWritten0123456789"


@pytest.fixture(scope="module")
def converted(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small pretrained Llama as a checkpoint step."""
    out: Path = tmp_path_factory.mktemp("converted") / "out"
    assert run_tool(pretrained, out) == 0
    return out / STEP


def losses(source: Path, records: Path, out: Path) -> list[Any]:
    recipe = small_recipe(
        source,
        records,
        out,
        topology="cpu-1",
        backend="torch",
        model=ModelSection(pretrained=str(source)),
        data=DataSection(path=str(records), preset="gsm8k", seq_len=112, batch_rows=4, max_records=30),
        schedule=ScheduleSection(max_steps=3),
        save=SaveSection(every_steps=0),
        export=ExportSection(enabled=False),
    )
    train(plan_recipe(recipe))
    return [(record.loss, record.grad_norm) for record in read_journal(out / JOURNAL_FILE)]


def test_training_starts_from_it_as_from_the_folder(
    pretrained: Path, converted: Path, records: Path, tmp_path: Path
) -> None:
    from_folder = losses(pretrained, records, tmp_path / "folder")
    assert losses(converted, records, tmp_path / "step") == from_folder and len(from_folder) == 3
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        one, other = (tmp_path / run / "assets" / name for run in ("folder", "step"))
        assert one.read_bytes() == other.read_bytes(), name


def test_it_answers_as_the_folder_does(pretrained: Path, converted: Path) -> None:
    words = ("Question: Ben has 3 apples", 12, ["backend=torch", "topology=cpu-1"])
    from_folder = answer(pretrained, *words, raw=True)
    assert answer(converted, *words, raw=True) == from_folder and from_folder


def put_into_hub_cache(source: Path, home: Path, name: str) -> None:
    """Lay a model folder out as a download of the hub id `name`."""
    cache = home / "hub" / f"models--{name.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123abc")
    shutil.copytree(source, cache / "snapshots" / "0123abc")


def test_hub_ids_and_a_token_that_goes_nowhere(tmp_path: Path) -> None:
    """Both ways, a hub id in the cache and one that cannot be had; all output and every file is searched."""
    source = write_model(tmp_path / "source")
    put_into_hub_cache(source, tmp_path / "home", "somebody/some-model")
    environ = {**os.environ, "HF_TOKEN": SENTINEL, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    commands = [
        ["source", "out", "--verify"],
        ["out", "back", "--verify"],
        ["inspect", "out", "--json"],
        ["diff", "out", "back"],
        ["somebody/some-model", "from-hub", "--verify=digests"],
        ["diff", "out", "from-hub"],
        ["nobody/no-such-model", "none"],
    ]
    code = f"from tools import convert_ckpt\nprint([convert_ckpt.main(words) for words in {commands}])"
    environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True)
    told = done.stdout + done.stderr
    assert done.stdout.endswith(b"[0, 0, 0, 1, 0, 1, 2]\n"), told.decode()
    # The two checkpoints differ in where they come from, and in nothing else.
    assert b"30 tensors\nother facts: 1\n  run.source.name: source / somebody/some-model\n" in done.stdout
    assert b"SOURCE=nobody/no-such-model: must be a folder, or a hub id" in told
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 80 and SENTINEL.encode() not in told
    assert [path for path in written if SENTINEL.encode() in path.read_bytes()] == []
