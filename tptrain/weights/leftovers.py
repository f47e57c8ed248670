"""Which folders beside a target belong to its writers, and what becomes of them when a writer was killed.

NAME is written as NAME.partial-PID-HEX/content. Beside the content lies a file that its writer keeps locked
(flock) while it lives; however a process ends, the kernel takes its locks away. A folder that is replaced is
called NAME.replaced-PID-HEX, with the same PID-HEX, between the two renames that put the new one there.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK_FILE = "lock"
_PARTIAL, _REPLACED = "partial", "replaced"


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that is this writer's alone; removed with all that is in it at the end."""
    lock = None
    while lock is None:  # once, but for another process's `recover` that comes upon it before it is locked
        partial = _sibling(path, _PARTIAL, f"{os.getpid()}-{uuid.uuid4().hex[:8]}")
        partial.mkdir(parents=True)
        lock = _try_lock(partial)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def swap(path: Path, content: Path, partial: Path) -> None:
    """Put the folder `content` in the place of the folder `path`, which ends up in `partial` to be removed.

    Killed at any point, this leaves both whole, and one of them is `path` or becomes it in `recover`.
    """
    aside = _sibling(path, _REPLACED, _suffixes(path, _PARTIAL)[partial])
    os.rename(path, aside)
    try:
        os.rename(content, path)
    except BaseException:
        if not os.path.lexists(path):
            os.rename(aside, path)
        raise
    # Under its own name it must be whole, so it is renamed before its files are removed.
    os.rename(aside, partial / _REPLACED)


def set_aside(path: Path) -> list[Path]:
    """Folders that stood at `path` until a writer, alive or not, began to replace them."""
    return list(_suffixes(path, _REPLACED))


def recover(path: Path) -> None:
    """Clear away what killed writers of `path` have left; what belongs to a live one is not touched.

    A folder that was being replaced goes back to `path` if nothing is there, or else is removed too.
    """
    leftovers = {*_suffixes(path, _PARTIAL).values(), *_suffixes(path, _REPLACED).values()}
    for suffix in sorted(leftovers):
        partial, aside = _sibling(path, _PARTIAL, suffix), _sibling(path, _REPLACED, suffix)
        # Another user's, or removed by another process in this moment: not for this one to deal with.
        with suppress(PermissionError, FileNotFoundError, FileExistsError):
            if aside.exists():
                partial.mkdir(exist_ok=True)  # there has to be something to lock
            lock = _try_lock(partial)
            if lock is not None:
                try:
                    _clear(path, partial, aside)
                finally:
                    os.close(lock)


def _clear(path: Path, partial: Path, aside: Path) -> None:
    if aside.exists():
        os.rename(aside, partial / _REPLACED if os.path.lexists(path) else path)
    shutil.rmtree(partial, ignore_errors=True)


def _sibling(path: Path, kind: str, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{suffix}")


def _suffixes(path: Path, kind: str) -> dict[Path, str]:
    """The folders of one kind beside `path`, and the PID-HEX of each."""
    if not path.parent.is_dir():
        return {}
    pattern = re.compile(rf"{re.escape(path.name)}\.{kind}-(\d+-[0-9a-f]{{8}})")
    named = [(folder, pattern.fullmatch(folder.name)) for folder in path.parent.iterdir()]
    return {
        folder: match[1] for folder, match in named if match and folder.is_dir() and not folder.is_symlink()
    }


def _try_lock(partial: Path) -> int | None:
    """The descriptor that holds a partial folder's lock; None if another process holds it or removed it."""
    try:
        descriptor = os.open(partial / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock of a file that was removed after it was opened keeps nobody out.
        if os.path.samestat(os.fstat(descriptor), os.stat(partial / _LOCK_FILE)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
