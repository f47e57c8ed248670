"""Files of a checkpoint that are links, or JSON no one should have to read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.weights.bad_input import INDEX, SHARDED, SINGLE, WEIGHTS, BadInput, broken, load
from tests.weights.bad_inputs import assets_with
from tests.weights.small_llama import saved_model

GENERATION = "generation_config.json"
NO_LINK, COPY = "must not be a link out of its folder", "a copy of the file in place of the link"


def linked(name: str, target: str | None = None) -> Callable[[Path], object]:
    """Replace a file by a link to `target`, or to the same file in a folder beside the checkpoint."""

    def change(folder: Path) -> None:
        elsewhere = folder.parent / "elsewhere" / Path(name).name
        elsewhere.parent.mkdir()
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(target or elsewhere)

    return change


def linked_shard(folder: Path) -> None:
    linked(min(folder.glob("model-*.safetensors")).name)(folder)


def shard_in_linked_folder(folder: Path) -> None:
    path = min(folder.glob("model-*.safetensors"))
    (folder.parent / "elsewhere").mkdir()
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    path.rename(folder / "sub" / path.name)
    index = (folder / INDEX).read_text()
    (folder / INDEX).write_text(index.replace(f'"{path.name}"', f'"sub/{path.name}"'))


def linked_templates(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "secret.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to(folder.parent / "elsewhere")


def in_hub_cache(target: str) -> Callable[[Path], object]:
    """A snapshot in the hub's cache whose weights link to `target`, as seen from the snapshot."""

    def trigger(tmp_path: Path) -> object:
        snapshot = tmp_path / "hub" / "models--some--llama" / "snapshots" / ("0" * 40)
        saved_model(snapshot)
        stolen = Path(os.path.normpath(snapshot / target))
        stolen.parent.mkdir(parents=True, exist_ok=True)
        (snapshot / SINGLE).rename(stolen)
        (snapshot / SINGLE).symlink_to(target)
        return load(snapshot)

    return trigger


def sparse(name: str) -> Callable[[Path], object]:
    """A file of more than 100 MB that takes no room."""
    return lambda folder: os.truncate(folder / name, 100_000_001)


def nested(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def fifo(folder: Path) -> None:
    (folder / GENERATION).unlink()
    os.mkfifo(folder / GENERATION)


DEEP_LIST = "[" * 100_000 + "]" * 100_000
DEEP_MAP = '{"weight_map":' * 65 + "{}" + "}" * 65
DEEP_CONFIG = json.dumps({"eos_token_id": 1})[:-1] + ', "a": ' + "[" * 64 + "]" * 64 + "}"

BAD_FILES = [
    BadInput(
        "weights that link to a system file",
        broken(linked(SINGLE, "/etc/passwd")),
        WEIGHTS, SINGLE, NO_LINK, "it links to /etc/passwd", COPY,
    ),
    BadInput(
        "weights that link to another folder",
        broken(linked(SINGLE)),
        WEIGHTS, SINGLE, NO_LINK, "/elsewhere/model.safetensors", COPY,
    ),
    BadInput(
        "weights that link to nothing",
        broken(linked(SINGLE, "gone.safetensors")),
        WEIGHTS, SINGLE, "must exist", "it is a link to nothing", "complete checkpoint",
    ),
    BadInput(
        "shard that links to another folder",
        broken(linked_shard, shards=SHARDED),
        WEIGHTS, "model-00001-of-00017.safetensors", NO_LINK, "/elsewhere/model-00001", COPY,
    ),
    BadInput(
        "shard behind a linked folder",
        broken(shard_in_linked_folder, shards=SHARDED),
        WEIGHTS, "sub/model-00001-of-00017.safetensors", NO_LINK, "/elsewhere/model-00001", COPY,
    ),
    BadInput(
        "index that links to another folder",
        broken(linked(INDEX), shards=SHARDED),
        WEIGHTS, INDEX, NO_LINK, "/elsewhere/model.safetensors.index.json", COPY,
    ),
    BadInput(
        "snapshot that links to another model's blob",
        in_hub_cache("../../../models--gated--secret/blobs/abc"),
        WEIGHTS, SINGLE, NO_LINK, "models--gated--secret/blobs/abc", COPY,
    ),
    BadInput(
        "snapshot that links out of the blobs",
        in_hub_cache("../../refs/main"),
        WEIGHTS, SINGLE, NO_LINK, "models--some--llama/refs/main", COPY,
    ),
    BadInput(
        "snapshot that links into the cache beside its shared blobs",
        in_hub_cache("../../../blobs/ab/abc"),
        WEIGHTS, SINGLE, NO_LINK, "/hub/blobs/ab/abc", COPY,
    ),
    BadInput(
        "generation_config.json that links to another folder",
        assets_with(linked(GENERATION)),
        WEIGHTS, GENERATION, NO_LINK, f"/elsewhere/{GENERATION}", COPY,
    ),
    BadInput(
        "config.json that links to a system file",
        assets_with(linked("config.json", "/etc/passwd")),
        "model.tokenizer", "config.json", NO_LINK, "it links to /etc/passwd", COPY,
    ),
    BadInput(
        "tokenizer that links to another folder",
        assets_with(linked("tokenizer.json")),
        "model.tokenizer", "tokenizer.json", NO_LINK, "/elsewhere/tokenizer.json", COPY,
    ),
    BadInput(
        "chat templates in a linked folder",
        assets_with(linked_templates),
        "model.tokenizer", "secret.jinja", NO_LINK, "/elsewhere/secret.jinja", COPY,
    ),
    BadInput(
        "index of an absurd size",
        broken(sparse(INDEX), shards=SHARDED),
        WEIGHTS, INDEX, "must be a JSON file", "larger than 100 MB", "as save_pretrained wrote it",
    ),
    BadInput(
        "generation_config.json of an absurd size",
        assets_with(sparse(GENERATION)),
        WEIGHTS, GENERATION, "must be a JSON file", "larger than 100 MB", "intact",
    ),
    BadInput(
        "index nested beyond Python's recursion limit",
        broken(nested(INDEX, DEEP_LIST), shards=SHARDED),
        WEIGHTS, INDEX, "must be a JSON file", "more than 64 levels deep", "as save_pretrained wrote it",
    ),
    BadInput(
        "index nested deeper than any index",
        broken(nested(INDEX, DEEP_MAP), shards=SHARDED),
        WEIGHTS, INDEX, "must be a JSON file", "more than 64 levels deep", "as save_pretrained wrote it",
    ),
    BadInput(
        "generation_config.json nested too deep",
        assets_with(nested(GENERATION, DEEP_CONFIG)),
        WEIGHTS, GENERATION, "must be a JSON file", "more than 64 levels deep", "intact",
    ),
    BadInput(
        "generation_config.json that is no regular file",
        assets_with(fifo),
        WEIGHTS, GENERATION, "must be a JSON file", "not a regular file", "intact",
    ),
    BadInput(
        "index that is not UTF-8",
        broken(lambda folder: (folder / INDEX).write_bytes(b'{"\xff": 1}'), shards=SHARDED),
        WEIGHTS, INDEX, "must be a JSON file", "invalid start byte", "as save_pretrained wrote it",
    ),
]  # fmt: skip
