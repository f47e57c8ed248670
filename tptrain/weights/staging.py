"""Publishing a folder: written beside its place, made durable, checked, then renamed: complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tptrain.errors import Problem, raise_if_any, refuse
from tptrain.hf_files import ADAPTER_CONFIG_FILE, CONFIG_FILE
from tptrain.weights.leftovers import partial_folder, recover, set_aside, swap

_OTHER_PATH = "another path, or remove it first"


def target_problems(
    path: Path, setting: str, needed_bytes: int = 0, free_bytes: int | None = None, overwrite: bool = False
) -> list[Problem]:
    """Why a folder of `needed_bytes` could not be published at `path`; an empty list if it could.

    free_bytes: room on the disk; None to ask the disk. overwrite: a model folder at `path` may be replaced.
    """
    if os.path.lexists(path):
        in_the_way = _not_replaceable(path, setting) if overwrite else _taken(path, setting, "it exists")
    else:
        aside = [] if overwrite else set_aside(path)
        in_the_way = _taken(path, setting, f"it was being replaced, and is {aside[0].name}") if aside else []
    if in_the_way:
        return in_the_way
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


def _taken(path: Path, setting: str, other: str) -> list[Problem]:
    fix = f"{_OTHER_PATH} (convert_ckpt.py: --overwrite)"
    return [Problem(setting, path, "must not exist yet", other, fix)]


def _not_replaceable(path: Path, setting: str) -> list[Problem]:
    """Anything but a model folder or an empty one: a mistyped path must not cost someone their files."""
    if path.is_symlink() or not path.is_dir():
        other = "it is a link" if path.is_symlink() else "it is a file"
        return [Problem(setting, path, "must be a folder to be replaced", other, _OTHER_PATH)]
    is_ours = any((path / name).exists() for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE))
    if not is_ours and any(path.iterdir()):
        other = f"it holds other files and no {CONFIG_FILE}"
        return [Problem(setting, path, "must be a model folder to be replaced", other, _OTHER_PATH)]
    return []


def nearest_existing(path: Path) -> Path:
    """The closest folder (or file) above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


@contextmanager
def staged_folder(
    path: Path,
    setting: str,
    needed_bytes: int = 0,
    overwrite: bool = False,
    verify: Callable[[Path], None] = lambda folder: None,
) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends, or is removed when the block raises.

    verify: called with the folder when the block has ended and all is on the disk; raises to keep it from
    being published. overwrite: replace the model folder that is at `path`, which stays until then.

    A process killed in the block leaves a `<name>.partial-...` folder, which no reader takes for the result
    and which the next writer removes. One killed while it replaces a folder leaves the complete earlier or
    the complete new one; if neither is at `path`, the next writer puts the earlier one back first.
    Raises ProblemsError if `path` exists without `overwrite`, or cannot be written.
    """
    place = path.absolute()
    with writing(path, setting):
        recover(place)
    raise_if_any(target_problems(path, setting, needed_bytes, overwrite=overwrite))
    with ExitStack() as stack:
        with writing(path, setting):
            partial = stack.enter_context(partial_folder(place))
            content = partial / "content"
            content.mkdir()
        yield content
        with writing(path, setting):
            _make_durable(content)
            verify(content)
            # Looked at again: a rename would replace an empty folder that someone has made since.
            raise_if_any(target_problems(path, setting, overwrite=overwrite))
            if os.path.lexists(path):
                swap(place, content, partial)
            else:
                os.rename(content, place)
            _fsync(place.parent)


@contextmanager
def writing(path: Path, setting: str) -> Iterator[None]:
    """Turns a failed write inside the block into a problem of the setting that chose the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        rule, fix = "must be writable to the end", "a disk with room that you may write"
        raise refuse(setting, path, rule, str(error), fix) from error


def _make_durable(folder: Path) -> None:
    """Flush every file of the folder, and the folders that name them, to the disk.

    A file that its writer has flushed already costs no writing here.
    """
    for directory, _, files in os.walk(folder):
        for name in files:
            _fsync(os.path.join(directory, name))
        _fsync(directory)


def _fsync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
