"""Bad inputs of the weights package: what triggers each, and what its error must say in all five parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.weights.small_llama import (
    read_config,
    rewrite,
    saved_model,
    saved_table,
    saved_tensors,
    small_tokenizer,
)
from tptrain.errors import raise_if_any
from tptrain.family import ParamRow
from tptrain.weights import (
    SafetensorsSource,
    check_export_target,
    collect_assets,
    export_folder,
    local_folder,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDED = "20KB"


@dataclass(frozen=True)
class BadInput:
    """One row: `trigger(tmp_path)` raises a ProblemsError with one problem of this setting.

    value: the end of the value that is shown. rule, other, fix: what these parts contain.
    """

    name: str
    trigger: Callable[[Path], object]
    setting: str
    value: str
    rule: str
    other: str
    fix: str


def load(folder: Path) -> SafetensorsSource:
    return SafetensorsSource(folder, saved_table(folder))


def broken(
    change: Callable[[Path], object], tied: bool = False, shards: str = "1GB"
) -> Callable[[Path], object]:
    """Save a checkpoint to `in`, break it, and load it."""

    def trigger(tmp_path: Path) -> object:
        folder = tmp_path / "in"
        saved_model(folder, tied, max_shard_size=shards)
        change(folder)
        return load(folder)

    return trigger


def with_tensors(**tensors: torch.Tensor | None) -> Callable[[Path], object]:
    return lambda folder: rewrite(
        folder, {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    )


def edit_index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return change


def point_norm_at(file: object) -> Callable[[Path], object]:
    return edit_index(lambda names: names.update({"model.norm.weight": file}))


def cut(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-5])


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def add_unnamed_tensor(folder: Path) -> None:
    path = second_shard(folder)
    kept = saved_tensors(folder)
    names = [
        name
        for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()
        if file == path.name
    ]
    save_file({**{name: kept[name] for name in names}, "stray.weight": torch.ones(2)}, path)


def only_pytorch_bin(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def shard_is_a_folder(folder: Path) -> None:
    path = second_shard(folder)
    path.unlink()
    path.mkdir()


def export_to(
    out: str, dtype: str = "bfloat16", read: Callable[[ParamRow], torch.Tensor] | None = None
) -> Callable[[Path], object]:
    def trigger(tmp_path: Path) -> object:
        saved_model(tmp_path / "in")
        (tmp_path / "taken").mkdir()
        (tmp_path / "file").write_text("")
        reader = read or (lambda row: torch.ones(row.size))
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
        tokenizer = small_tokenizer()
        tokenizer.save_pretrained(folder)
        change(folder)
        return collect_assets(tmp_path / "assets", read_config(folder), tokenizer, folder, folder)

    return trigger


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


def assets_without_tokenizer(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    (tmp_path / "assets").mkdir()
    table, config = saved_table(tmp_path / "in"), read_config(tmp_path / "in")
    export_folder(tmp_path / "out", table, config, lambda row: torch.ones(row.size), tmp_path / "assets")


WEIGHTS = "model.pretrained"
TARGET = "export.path"

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
        "weights in another format",
        broken(only_pytorch_bin),
        WEIGHTS, "in", f"must hold {SINGLE} or {INDEX}", "pytorch_model.bin", "save_pretrained",
    ),
    BadInput(
        "single file beside an index",
        broken(lambda folder: (folder / SINGLE).write_bytes(b""), shards=SHARDED),
        WEIGHTS, "in", "not both", f"transformers would load {SINGLE}", "out of date",
    ),
    BadInput(
        "truncated file",
        broken(cut),
        WEIGHTS, SINGLE, "complete safetensors file", "not fully covered", "intact",
    ),
    BadInput(
        "empty file",
        broken(lambda folder: (folder / SINGLE).write_bytes(b"")),
        WEIGHTS, SINGLE, "complete safetensors file", "header too small", "intact",
    ),
    BadInput(
        "header of nonsense",
        broken(lambda folder: (folder / SINGLE).write_bytes(b"\x09" + bytes(7) + b"{\"a\": 1}}")),
        WEIGHTS, SINGLE, "complete safetensors file", "header", "intact",
    ),
    BadInput(
        "shard that is missing",
        broken(lambda folder: second_shard(folder).unlink(), shards=SHARDED),
        WEIGHTS, ".safetensors", "must exist", f"{INDEX} names it", "complete checkpoint",
    ),
    BadInput(
        "shard that is a folder",
        broken(shard_is_a_folder, shards=SHARDED),
        WEIGHTS, ".safetensors", "complete safetensors file", "it is a folder", "intact",
    ),
    BadInput(
        "index that is not JSON",
        broken(lambda folder: (folder / INDEX).write_text("{"), shards=SHARDED),
        WEIGHTS, INDEX, "must be a JSON file", "line 1", "as save_pretrained wrote it",
    ),
    BadInput(
        "index without a map",
        broken(lambda folder: (folder / INDEX).write_text("[]"), shards=SHARDED),
        WEIGHTS, INDEX, "must map tensor names to files", "no weight_map", "as save_pretrained wrote it",
    ),
    BadInput(
        "index with a number for a file",
        broken(point_norm_at(3), shards=SHARDED),
        WEIGHTS, INDEX, "tensor names to file names", "model.norm.weight: 3", "as save_pretrained wrote it",
    ),
    BadInput(
        "index that leaves the folder",
        broken(point_norm_at("../x.safetensors"), shards=SHARDED),
        WEIGHTS, INDEX, "inside its own folder", "../x.safetensors", "as save_pretrained wrote it",
    ),
    BadInput(
        "index that leaves the folder half-way",
        broken(point_norm_at("a\\..\\..\\x"), shards=SHARDED),
        WEIGHTS, INDEX, "inside its own folder", "a\\..\\..\\x", "as save_pretrained wrote it",
    ),
    BadInput(
        "index with an absolute path",
        broken(point_norm_at("/etc/passwd"), shards=SHARDED),
        WEIGHTS, INDEX, "inside its own folder", "/etc/passwd", "as save_pretrained wrote it",
    ),
    BadInput(
        "index that names an absent tensor",
        broken(edit_index(lambda names: names.update({"a.b": names["model.norm.weight"]})), shards=SHARDED),
        WEIGHTS, INDEX, "must name tensors that its files hold", "1 absent: a.b in model-", "as it was saved",
    ),
    BadInput(
        "shard with a tensor that the index does not name",
        broken(add_unnamed_tensor, shards=SHARDED),
        WEIGHTS, INDEX, "must name every tensor of its files", "1 unnamed: stray.weight in model-",
        "as it was saved",
    ),
    BadInput(
        "missing tensor",
        broken(with_tensors(model__norm__weight=None)),
        WEIGHTS, "in", "every tensor of the model", "1 missing of 30: model.norm.weight", "model.config",
    ),
    BadInput(
        "extra tensor",
        broken(with_tensors(score__weight=torch.ones(2))),
        WEIGHTS, "in", "no tensor that the model lacks", "1 extra: score.weight", "model.config",
    ),
    BadInput(
        "misshapen tensor",
        broken(with_tensors(model__norm__weight=torch.ones(49))),
        WEIGHTS, "in", "the model's sizes", "model.norm.weight [49] in the file, [48] in the model",
        "model.config",
    ),
    BadInput(
        "quantized tensor",
        broken(with_tensors(model__norm__weight=torch.ones(48, dtype=torch.int8))),
        WEIGHTS, "in", "floating-point", "model.norm.weight I8", "not quantized",
    ),
    BadInput(
        "8-bit float tensor",
        broken(with_tensors(model__norm__weight=torch.ones(48).to(torch.float8_e4m3fn))),
        WEIGHTS, "in", "floating-point", "model.norm.weight F8_E4M3", "not quantized",
    ),
    BadInput(
        "tied tensors that differ",
        broken(with_tensors(lm_head__weight=torch.ones(131, 48)), tied=True),
        WEIGHTS, "in", "ties them", "lm_head.weight differs from model.embed_tokens.weight",
        "tie_word_embeddings=false",
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
