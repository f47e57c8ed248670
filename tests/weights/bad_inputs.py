"""Bad inputs of other kinds: names of folders, what travels with a run, and places to export to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.weights.bad_input import WEIGHTS, BadInput
from tests.weights.small_llama import read_config, saved_model, saved_table, small_tokenizer
from tptrain.errors import raise_if_any
from tptrain.family import ParamRow
from tptrain.weights import (
    SafetensorsSource,
    blocks_of,
    check_export_target,
    collect_assets,
    export_folder,
    local_folder,
)

TARGET = "export.path"


def export_to(
    out: str, dtype: str = "bfloat16", read: Callable[[ParamRow], torch.Tensor] | None = None
) -> Callable[[Path], object]:
    def trigger(tmp_path: Path) -> object:
        saved_model(tmp_path / "in")
        (tmp_path / "taken").mkdir()
        (tmp_path / "file").write_text("")
        reader = blocks_of(read or (lambda row: torch.ones(row.size)))
        table = saved_table(tmp_path / "in")
        return export_folder(tmp_path / out, table, read_config(tmp_path / "in"), reader, dtype=dtype)

    return trigger


def large_norm(row: ParamRow) -> torch.Tensor:
    return torch.full(row.size, 1e5 if row.name == "model.norm.weight" else 1.0)


def no_room(tmp_path: Path) -> None:
    raise_if_any(check_export_target(tmp_path / "out", "export.path", 16_060_000_000, 3_000_000_000))


def unreachable_hub(tmp_path: Path) -> None:
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        SafetensorsSource("some/llama", [])


def missing_folder(tmp_path: Path) -> None:
    SafetensorsSource(tmp_path / "nowhere", [])


def empty_name(tmp_path: Path) -> None:
    SafetensorsSource("", [])


def a_file(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    local_folder(tmp_path / "weights.safetensors", "model.pretrained", ())


def assets_with(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def trigger(tmp_path: Path) -> object:
        folder = tmp_path / "in"
        saved_model(folder)
        tokenizer, config = small_tokenizer(), read_config(folder)
        tokenizer.save_pretrained(folder)
        change(folder)
        return collect_assets(tmp_path / "assets", config, tokenizer, folder, folder)

    return trigger


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


def assets_without_tokenizer(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    (tmp_path / "assets").mkdir()
    table, config = saved_table(tmp_path / "in"), read_config(tmp_path / "in")
    reader = blocks_of(lambda row: torch.ones(row.size))
    export_folder(tmp_path / "out", table, config, reader, tmp_path / "assets")


def with_auto_map(file: str, auto_map: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, "auto_map": auto_map}))

    return assets_with(change)


BAD_INPUTS = [
    BadInput(
        "folder that is not there",
        missing_folder,
        WEIGHTS, "nowhere", "must be a folder or a hub id", "no such folder", "org/name",
    ),
    BadInput(
        "empty name",
        empty_name,
        WEIGHTS, "", "must be a folder or a hub id", "no such folder", "org/name",
    ),
    BadInput(
        "file for a folder",
        a_file,
        WEIGHTS, "weights.safetensors", "must be a folder", "a file", "its folder",
    ),
    BadInput(
        "hub that cannot be reached",
        unreachable_hub,
        WEIGHTS, "some/llama", "hub id that can be downloaded", "LocalEntryNotFoundError", "a local folder",
    ),
    BadInput(
        "generation_config.json that is not JSON",
        assets_with(lambda folder: (folder / "generation_config.json").write_text("{")),
        WEIGHTS, "generation_config.json", "must be a JSON file", "line 1", "intact",
    ),
    BadInput(
        "generation_config.json that is no object",
        assets_with(lambda folder: (folder / "generation_config.json").write_text("[1]")),
        WEIGHTS, "generation_config.json", "must be a JSON object", "it is a list", "{...}",
    ),
    BadInput(
        "folder without a tokenizer",
        assets_with(no_tokenizer),
        "model.tokenizer", "in", "must hold a tokenizer", "no tokenizer files", "tokenizer.json",
    ),
    BadInput(
        "tokenizer with code of its own",
        with_auto_map("tokenizer_config.json", {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}),
        "model.tokenizer", "tokenizer_config.json", "code of its own", "for AutoTokenizer", "tokenizer.json",
    ),
    BadInput(
        "tokenizer with code of its own, spelled as older versions did",
        with_auto_map("tokenizer_config.json", ["evil.Slow", None]),
        "model.tokenizer", "tokenizer_config.json", "code of its own", "for AutoTokenizer", "tokenizer.json",
    ),
    BadInput(
        "config with code of its own",
        with_auto_map("config.json", {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Slow", None]}),
        "model.tokenizer", "config.json", "code of its own", "for AutoTokenizer and AutoConfig",
        "transformers knows",
    ),
    BadInput(
        "assets without a tokenizer",
        assets_without_tokenizer,
        "assets", "assets", "must hold a tokenizer", "no tokenizer files", "tokenizer.json",
    ),
    BadInput(
        "export that exists",
        export_to("taken"),
        TARGET, "taken", "must not exist yet", "it exists", "another path",
    ),
    BadInput(
        "export below a file",
        export_to("file/out"),
        TARGET, "out", "writable folder", "is not a folder", "may write",
    ),
    BadInput(
        "disk without room",
        no_room,
        TARGET, "out", "a disk with 16.1 GB free", "free: 3 GB", "free 13.1 GB there",
    ),
    BadInput(
        "weight too large for float16",
        export_to("out", "float16", large_norm),
        "export.dtype", "float16", "hold every weight",
        "model.norm.weight has 100000, the largest float16 is 65504",
        "'bfloat16' or 'float32'",
    ),
]  # fmt: skip
