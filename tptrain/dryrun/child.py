"""What the processes that trace and compile have in common: a clean environment, and their last words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import tptrain

_STDERR_LINES = 12


def child_environment(environ: Mapping[str, str], steering: tuple[str, ...]) -> dict[str, str]:
    """The environment of a child that imports this tptrain; `steering`: beginnings of names left out."""
    kept = {name: value for name, value in environ.items() if not name.startswith(steering)}
    root = str(Path(tptrain.__file__).parent.parent)
    path = os.pathsep.join(part for part in (root, kept.get("PYTHONPATH", "")) if part)
    return {**kept, "PYTHONPATH": path}


def last_lines(stderr: str) -> list[str]:
    """What a child said last, for the message about its end."""
    return stderr.strip().splitlines()[-_STDERR_LINES:]
