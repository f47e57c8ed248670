"""Outcomes of compiles on disk, by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tptrain.program.compiled import CompiledProgram, Outcome

# Raised when a result's meaning or form changes, so that older files are not found.
_FORM = 2
# The others depend on the machine, or may pass when tried again.
_LASTING: tuple[Outcome, ...] = ("compiled", "out_of_memory", "refused", "no_topology")


def default_cache_dir() -> Path:
    """`tptrain/compiled` in the user's cache folder (XDG Base Directory Specification)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tptrain" / "compiled"


@dataclass(frozen=True)
class CompileCache:
    """One JSON file per compile."""

    folder: Path

    def key(self, proto: bytes, parts: Mapping[str, Any]) -> str:
        """The name of a compile: a digest of the program and of the parts, which must be JSON data."""
        text = json.dumps({"form": _FORM, **parts}, sort_keys=True)
        return hashlib.sha256(hashlib.sha256(proto).digest() + text.encode()).hexdigest()

    def read(self, key: str) -> CompiledProgram | None:
        """The outcome stored under `key`. A file that cannot be read as one is the same as none."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return replace(CompiledProgram.from_json(path.read_bytes()), cached=True)
        except (OSError, ValueError):
            # Cut off or of another version: the compile is done again and the file replaced.
            return None

    def write(self, key: str, program: CompiledProgram) -> None:
        """Store an outcome that would be the same another time; a reader sees all of it or nothing."""
        unread = program.outcome == "compiled" and program.cost is None
        if program.outcome not in _LASTING or unread:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(program.to_json())
            os.replace(name, self._path(key))
        except BaseException:
            os.unlink(name)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
