"""Publishing a folder: written beside its place, made durable, then renamed, so it is complete or absent."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tptrain.errors import Problem, raise_if_any, refuse


def target_problems(
    path: Path, setting: str, needed_bytes: int = 0, free_bytes: int | None = None
) -> list[Problem]:
    """Why a folder of `needed_bytes` could not be published at `path`; an empty list if it could.

    free_bytes: room on the disk; None to ask the disk.
    """
    if os.path.lexists(path):
        return [Problem(setting, path, "must not exist yet", "it exists", "another path, or remove it first")]
    parent = nearest_existing(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        other = f"{parent} {'is not writable for this user' if parent.is_dir() else 'is not a folder'}"
        return [Problem(setting, path, "must lie in a writable folder", other, "a path that you may write")]
    free = shutil.disk_usage(parent).free if free_bytes is None else free_bytes
    if free < needed_bytes:
        rule = f"must lie on a disk with {_gigabytes(needed_bytes)} free"
        fix = f"another disk, or free {_gigabytes(needed_bytes - free)} there"
        return [Problem(setting, path, rule, f"free: {_gigabytes(free)}", fix)]
    return []


def nearest_existing(path: Path) -> Path:
    """The closest folder (or file) above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


@contextmanager
def staged_folder(path: Path, setting: str) -> Iterator[Path]:
    """A new folder beside `path` that becomes `path` when the block ends, or is removed when it raises.

    A process that is killed leaves a `<name>.partial-...` folder, which no reader takes for the result and
    which a later run neither uses nor trips over. Raises ProblemsError if `path` exists or cannot be written.
    """
    raise_if_any(target_problems(path, setting))
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    with writing(path, setting):
        partial.mkdir(parents=True)
    try:
        yield partial
        with writing(path, setting):
            _make_durable(partial)
            _rename(partial, path, setting)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def writing(path: Path, setting: str) -> Iterator[None]:
    """Turns a failed write inside the block into a problem of the setting that chose the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        rule, fix = "must be writable to the end", "a disk with room that you may write"
        raise refuse(setting, path, rule, str(error), fix) from error


def _make_durable(folder: Path) -> None:
    """Flush every file of the folder, and the folders that name them, to the disk."""
    for directory, _, files in os.walk(folder):
        for name in files:
            _fsync(os.path.join(directory, name))
        _fsync(directory)


def _rename(partial: Path, path: Path, setting: str) -> None:
    # A rename would replace an empty folder that someone has made since the first check.
    raise_if_any(target_problems(path, setting))
    os.rename(partial, path)
    _fsync(path.parent)


def _fsync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
