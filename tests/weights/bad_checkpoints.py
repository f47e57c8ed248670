"""Bad checkpoints: folders, files and indexes that contradict themselves, each other or the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.weights.bad_input import INDEX, SHARDED, SINGLE, WEIGHTS, BadInput, broken
from tests.weights.small_llama import rewrite, saved_tensors


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


def large_header(folder: Path) -> None:
    with (folder / SINGLE).open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # takes no room on the disk


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def add_unnamed_tensor(folder: Path) -> None:
    path = second_shard(folder)
    kept = saved_tensors(folder)
    names = [name for name, file in weight_map(folder).items() if file == path.name]
    save_file({**{name: kept[name] for name in names}, "stray.weight": torch.ones(2)}, path)


def renamed(*names: str) -> Callable[[Path], object]:
    """The weights under other names, and nothing in safetensors."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes((folder / SINGLE).read_bytes())
        (folder / SINGLE).unlink()

    return change


def store_twice(folder: Path) -> None:
    """Add a tensor of another shard to the second."""
    path, name = second_shard(folder), "lm_head.weight"
    kept = {
        name: tensor
        for name, tensor in saved_tensors(folder).items()
        if weight_map(folder)[name] == path.name
    }
    save_file({**kept, name: torch.ones(2)}, path)


def weight_map(folder: Path) -> dict[str, str]:
    names: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return names


def state_total_size(total_size: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["metadata"]["total_size"] = total_size
        (folder / INDEX).write_text(json.dumps(index))

    return change


def shard_is_a_folder(folder: Path) -> None:
    path = second_shard(folder)
    path.unlink()
    path.mkdir()


BAD_CHECKPOINTS = [
    BadInput(
        "weights that are a pickle",
        broken(renamed("pytorch_model.bin")),
        WEIGHTS, "in", f"must hold {SINGLE} or {INDEX}",
        "pytorch_model.bin: pickle files, which can run code when they are loaded",
        "a copy in safetensors: load and save_pretrained it where running its code does no harm",
    ),
    BadInput(
        "pickles of several formats",
        broken(renamed("a.pt", "b.ckpt", "c.pth", "d.pkl", "pytorch_model-1-of-2.bin", "training_args.bin")),
        WEIGHTS, "in", f"must hold {SINGLE} or {INDEX}",
        "a.pt, b.ckpt, c.pth, d.pkl, pytorch_model-1-of-2.bin, training_args.bin: pickle files",
        "a copy in safetensors",
    ),
    BadInput(
        "no weights at all",
        broken(renamed()),
        WEIGHTS, "in", f"must hold {SINGLE} or {INDEX}", "it holds: config.json", "save_pretrained",
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
        "header of more than 100 MB that is there",
        broken(large_header),
        WEIGHTS, SINGLE, "complete safetensors file", "header too large", "intact",
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
        "index with Windows separators",
        broken(point_norm_at("a\\b.safetensors"), shards=SHARDED),
        WEIGHTS, INDEX, "inside its own folder", "a\\b.safetensors", "as save_pretrained wrote it",
    ),
    BadInput(
        "index with a Windows drive",
        broken(point_norm_at("C:/b.safetensors"), shards=SHARDED),
        WEIGHTS, INDEX, "inside its own folder", "C:/b.safetensors", "as save_pretrained wrote it",
    ),
    BadInput(
        "index that names its folder",
        broken(point_norm_at("."), shards=SHARDED),
        WEIGHTS, INDEX, "inside its own folder", ".", "as save_pretrained wrote it",
    ),
    BadInput(
        "index with an empty file name",
        broken(point_norm_at(""), shards=SHARDED),
        WEIGHTS, INDEX, "printable characters", "''", "as save_pretrained wrote it",
    ),
    BadInput(
        "index with a NUL in a file name",
        broken(point_norm_at("a\0b.safetensors"), shards=SHARDED),
        WEIGHTS, INDEX, "printable characters", "'a\\x00b.safetensors'", "as save_pretrained wrote it",
    ),
    BadInput(
        "index with half a surrogate pair in a file name",
        broken(point_norm_at("\ud800.safetensors"), shards=SHARDED),
        WEIGHTS, INDEX, "printable characters", "'\\ud800.safetensors'", "as save_pretrained wrote it",
    ),
    BadInput(
        "index with a terminal's control characters in a tensor name",
        broken(edit_index(lambda names: names.update({"\x1b[2J": "a"})), shards=SHARDED),
        WEIGHTS, INDEX, "printable characters", "'\\x1b[2J'", "as save_pretrained wrote it",
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
        "tensor that two shards hold",
        broken(store_twice, shards=SHARDED),
        WEIGHTS, INDEX, "hold each tensor once",
        "1 stored more than once: lm_head.weight in model-00002-of-00017.safetensors and model-00016-of-",
        "as it was saved",
    ),
    BadInput(
        "index with a total that is one byte off",
        broken(state_total_size(282047), shards=SHARDED),
        WEIGHTS, INDEX, "metadata.total_size", "it says 282047, the files hold 282048", "282048 there",
    ),
    BadInput(
        "index with a total that is no number",
        broken(state_total_size("282048"), shards=SHARDED),
        WEIGHTS, INDEX, "metadata.total_size", "it says '282048', the files hold 282048", "282048 there",
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
]  # fmt: skip
