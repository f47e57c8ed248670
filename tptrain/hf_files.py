"""Which files make up a Hugging Face checkpoint, and where they are: a local folder or the hub's cache."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tptrain.errors import Problem, raise_if_any, refuse
from tptrain.untrusted import link_problems, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Of adapters, as PEFT names them.
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"

WEIGHT_FILES = (SINGLE_FILE, INDEX_FILE, "model-*.safetensors")
CONFIG_FILES = (CONFIG_FILE, GENERATION_FILE)
# Every file that a tokenizer of transformers 4 or 5 is read from; the last is for several chat templates.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
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

# What transformers loads on the way to a tokenizer, and may have code of its own.
_LOADED_WITH_TOKENIZER = ("AutoTokenizer", "AutoConfig")


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a folder, as paths relative to it."""
    return _matching(folder, TOKENIZER_FILES)


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern))


def require_tokenizer(folder: Path, setting: str) -> None:
    """Raise ProblemsError for a folder without tokenizer files, with links out of it, or that needs code."""
    names = tokenizer_files(folder)
    if not names:
        fix = "a folder with tokenizer.json"
        raise refuse(setting, folder, "must hold a tokenizer", "it has no tokenizer files", fix)
    raise_if_any(link_problems(folder, names, setting))
    raise_if_any(_code_problems(folder, setting))


def _code_problems(folder: Path, setting: str) -> list[Problem]:
    """A tokenizer made by Python files of the checkpoint: transformers would ask whether to run them."""
    problems = []
    for path in (folder / TOKENIZER_CONFIG_FILE, folder / CONFIG_FILE):
        auto_map = read_json(path, setting).get("auto_map") if path.exists() else None
        # An older spelling is not an object but the bare names of tokenizer classes.
        names = auto_map if isinstance(auto_map, dict) else _LOADED_WITH_TOKENIZER[:1] if auto_map else ()
        named = [name for name in _LOADED_WITH_TOKENIZER if name in names]
        if named:
            rule = "must not need code of its own"
            other = f"its auto_map names Python code for {' and '.join(named)}"
            fix = "a tokenizer that transformers knows, or tokenizer.json saved where that code may run"
            problems.append(Problem(setting, path, rule, other, fix))
    return problems


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of one folder into another, byte for byte."""
    for name in tokenizer_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def local_folder(name: str | Path, setting: str, patterns: Sequence[str]) -> Path:
    """The folder that `name` stands for: itself, or the hub's snapshot of the files that match `patterns`.

    name: a local folder, or a hub id such as `org/model`.
    Raises ProblemsError when it is neither, when the hub cannot be reached and its cache lacks the files, or
    when a file that matches is a link out of the folder.
    """
    folder = Path(name).expanduser()
    if not str(name) or not folder.is_dir():
        folder = _download(_hub_id(name, setting), setting, patterns)
    raise_if_any(link_problems(folder, _matching(folder, patterns), setting))
    return folder


def _hub_id(name: str | Path, setting: str) -> str:
    rule, path = "must be a folder or a hub id", Path(name).expanduser()
    if str(name) and path.exists():
        raise refuse(setting, name, rule, "it is a file", f"its folder, {path.parent}")
    if not _HUB_ID.fullmatch(str(name)):
        other = "no such folder, and not of the form org/name"
        raise refuse(setting, name, rule, other, "the path of a folder, or org/name")
    return str(name)


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
