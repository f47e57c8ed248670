"""Which files make up a Hugging Face checkpoint, and where they are: a local folder or the hub's cache."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tptrain.errors import refuse

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

WEIGHT_FILES = (SINGLE_FILE, INDEX_FILE, "model-*.safetensors")
CONFIG_FILES = (CONFIG_FILE, GENERATION_FILE)
# Every file that a tokenizer of transformers 4 or 5 is read from; the last is for several chat templates.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "additional_chat_templates/*.jinja",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a folder, as paths relative to it."""
    return sorted(path.relative_to(folder) for pattern in TOKENIZER_FILES for path in folder.glob(pattern))


def require_tokenizer(folder: Path, setting: str) -> None:
    """Raise ProblemsError for a folder without tokenizer files."""
    if not tokenizer_files(folder):
        fix = "a folder with tokenizer.json"
        raise refuse(setting, folder, "must hold a tokenizer", "it has no tokenizer files", fix)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of one folder into another, byte for byte."""
    for name in tokenizer_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def local_folder(name: str | Path, setting: str, patterns: Sequence[str]) -> Path:
    """The folder that `name` stands for: itself, or the hub's snapshot of the files that match `patterns`.

    name: a local folder, or a hub id such as `org/model`.
    Raises ProblemsError when it is neither, or when the hub cannot be reached and its cache lacks the files.
    """
    path = Path(name).expanduser()
    if str(name) and path.is_dir():
        return path
    rule = "must be a folder or a hub id"
    if str(name) and path.exists():
        raise refuse(setting, name, rule, "it is a file", f"its folder, {path.parent}")
    hub_id = str(name)
    if not _HUB_ID.fullmatch(hub_id):
        other = "no such folder, and not of the form org/name"
        raise refuse(setting, name, rule, other, "the path of a folder, or org/name")
    return _download(hub_id, setting, patterns)


def _download(hub_id: str, setting: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises several kinds that have no base of their own
        reason = str(error).strip().splitlines() or [""]
        raise refuse(
            setting,
            hub_id,
            "must be a folder, or a hub id that can be downloaded or is in the hub's cache",
            f"no such folder; the hub: {type(error).__name__}: {reason[0]}",
            "a local folder, or a machine that reaches the hub (for gated models: after `hf auth login`)",
        ) from error
