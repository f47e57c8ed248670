"""Files that came with a checkpoint, treated as written by a stranger: links, sizes, JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tptrain.errors import Problem, raise_if_any, refuse

MAX_JSON_BYTES = 100_000_000
# Far above any config, far below the depth at which Python's own recursion limit is met.
MAX_JSON_DEPTH = 64

# Where the hub's cache keeps files that several models share, relative to it (huggingface_hub 2.4).
_SHARED_BLOB = re.compile(r"blobs/[0-9a-f]{2}/[0-9a-f]{64}")


def printable(name: str) -> str:
    """A name as it is, or escaped if a terminal would not show it as it is."""
    return name if name.isprintable() and name else repr(name)


def link_problems(folder: Path, names: Iterable[str | Path], setting: str) -> list[Problem]:
    """A problem for each file of `folder` that is, or lies behind, a link to a place outside.

    Otherwise a checkpoint could make a run read any file of its user, and copy it into an export. Links from
    a snapshot of the Hugging Face cache into that cache's own blobs are what the cache is made of, and pass.
    """
    root = Path(os.path.realpath(folder))
    problems = []
    for name in names:
        target = Path(os.path.realpath(folder / name))
        if not target.is_relative_to(root) and not _is_blob_of(root, target):
            rule, other = "must not be a link out of its folder", f"it links to {target}"
            fix = "a folder that holds a copy of the file in place of the link"
            problems.append(Problem(setting, folder / name, rule, other, fix))
    return problems


def _is_blob_of(root: Path, target: Path) -> bool:
    """Whether `root` lies in models--X/snapshots and `target` is a blob of that model or of its cache."""
    for snapshots in root.parents:
        repo = snapshots.parent
        if snapshots.name == "snapshots" and repo.name.startswith("models--"):
            own = target.parent == repo / "blobs"
            shared = target.is_relative_to(repo.parent) and _SHARED_BLOB.fullmatch(
                target.relative_to(repo.parent).as_posix()
            )
            return own or bool(shared)
    return False


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises ProblemsError if it is none, is a link out of its folder, has more than MAX_JSON_BYTES or is nested
    more than MAX_JSON_DEPTH deep.
    """
    raise_if_any(link_problems(path.parent, [path.name], setting))
    try:
        content = bounded_json(path)
    except (OSError, ValueError) as error:
        raise refuse(setting, path, "must be a JSON file", str(error), "an intact copy of it") from error
    if not isinstance(content, dict):
        raise refuse(setting, path, "must be a JSON object", f"it is a {type(content).__name__}", "{...}")
    return content


def bounded_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError, or ValueError if it is no JSON, too large or too deep."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES // 10**6} MB")
    too_deep = f"it is nested more than {MAX_JSON_DEPTH} levels deep"
    try:
        content = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(too_deep) from error
    if _deeper_than(content, MAX_JSON_DEPTH):
        raise ValueError(too_deep)
    return content


def _deeper_than(content: Any, limit: int) -> bool:
    """Whether objects and lists are nested more than `limit` deep, found without recursion."""
    layer = [content]
    for _ in range(limit + 1):
        nested = [value for value in layer if isinstance(value, dict | list)]
        if not nested:
            return False
        layer = [item for value in nested for item in (value.values() if isinstance(value, dict) else value)]
    return True
