"""The digest manifest of a checkpoint step: what every file must hold, and the mark that it is complete.

Orbax keeps no checksum: a flipped bit in a committed step would load in silence. `manifest.json` names every
file of a step with its size and its XXH3-128 digest. It is written last, so a step without one was not
finished. XXH3 finds accidents, not forgeries; it runs at the speed of memory (BUILD.md has the numbers).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

MANIFEST = "manifest.json"
ALGORITHM = "xxh3_128"
FORMAT = 1

# Larger buffers come from mmap, file by file, and make the threads that restore wait for page tables.
_READ_BYTES = 2**20
_THREADS = 2

# (size in bytes, hexadecimal digest)
FileDigest = tuple[int, str]


@dataclass(frozen=True)
class Manifest:
    """files: path relative to the step's folder -> size and digest. metrics: scores of the step, by name."""

    step: int
    files: Mapping[str, FileDigest]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Damage:
    """A file that is not what was saved."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


def digest_chunk(chunk: np.ndarray, chunk_shape: Sequence[int]) -> FileDigest:
    """Size and digest of the file that a chunk becomes: C order, zeros where the edge cuts it."""
    if chunk.shape != tuple(chunk_shape):
        missing = [(0, n - m) for n, m in zip(chunk_shape, chunk.shape, strict=True)]
        chunk = np.pad(chunk, missing)
    data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
    return data.nbytes, xxhash.xxh3_128_hexdigest(data.data)


def digest_file(path: Path) -> FileDigest:
    """Size and digest of a file, read through a small buffer."""
    state, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_READ_BYTES)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            state.update(view[:count])
            size += count
    return size, state.hexdigest()


def files_of(step_folder: Path) -> list[str]:
    """All files of a step but the manifest, as sorted relative paths."""
    found = []
    for directory, _, names in os.walk(step_folder):
        found += [os.path.relpath(os.path.join(directory, name), step_folder) for name in names]
    return sorted(path for path in found if path != MANIFEST)


def write_manifest(step_folder: Path, manifest: Manifest) -> None:
    """Publish a step: write its manifest beside, flush it to the disk, rename it."""
    content = {
        "format": FORMAT,
        "algorithm": ALGORITHM,
        "step": manifest.step,
        "metrics": dict(manifest.metrics),
        "files": {path: list(manifest.files[path]) for path in sorted(manifest.files)},
    }
    partial = step_folder / f".{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, step_folder / MANIFEST)


class ManifestError(ValueError):
    """A manifest that cannot be used; the message says why."""


def read_manifest(step_folder: Path) -> Manifest:
    """Raises FileNotFoundError where there is none, ManifestError where it is damaged."""
    path = step_folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _parsed(content)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{type(error).__name__}: {error}") from error


def _parsed(content: Any) -> Manifest:
    if content["format"] != FORMAT or content["algorithm"] != ALGORITHM:
        raise ManifestError(f"format {content['format']!r}, algorithm {content['algorithm']!r}")
    files = {str(path): (int(size), str(digest)) for path, (size, digest) in content["files"].items()}
    metrics = {str(name): float(value) for name, value in content["metrics"].items()}
    return Manifest(int(content["step"]), files, metrics)


class BackgroundCheck:
    """Compares files with the manifest in threads, while something else reads them."""

    def __init__(self, step_folder: Path, manifest: Manifest | None, paths: Sequence[str]):
        """manifest: None for nothing to compare with, when there must be no paths."""
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tptrain-verify")
        expected = manifest.files if manifest is not None else {}
        self._looks = [
            self._pool.submit(_damage, step_folder / path, path, expected.get(path)) for path in paths
        ]

    def result(self) -> list[Damage]:
        """The damaged files, when all are read."""
        found = [look.result() for look in self._looks]
        self._pool.shutdown()
        return [damage for damage in found if damage is not None]


def damages(step_folder: Path, manifest: Manifest, paths: Sequence[str]) -> list[Damage]:
    """Which of these files are missing, of another size, or of another digest than the manifest says."""
    return BackgroundCheck(step_folder, manifest, paths).result()


def listing_damages(step_folder: Path, manifest: Manifest) -> list[Damage]:
    """Files that the manifest names and are missing or misshapen, or that it does not name; none is read."""
    there = set(files_of(step_folder))
    extra = [Damage(path, "not in the manifest") for path in sorted(there - set(manifest.files))]
    missing = [Damage(path, "missing") for path in sorted(set(manifest.files) - there)]
    sized = [
        Damage(path, f"{os.path.getsize(step_folder / path)} bytes, {size} were saved")
        for path, (size, _) in sorted(manifest.files.items())
        if path in there and os.path.getsize(step_folder / path) != size
    ]
    if manifest.step != int(step_folder.name):
        extra.insert(0, Damage(MANIFEST, f"it is of step {manifest.step}"))
    return [*extra, *missing, *sized]


def _damage(path: Path, name: str, expected: FileDigest | None) -> Damage | None:
    if expected is None:
        return Damage(name, "not in the manifest")
    try:
        size, digest = digest_file(path)
    except OSError as error:
        return Damage(name, error.strerror or str(error))
    if size != expected[0]:
        return Damage(name, f"{size} bytes, {expected[0]} were saved")
    return None if digest == expected[1] else Damage(name, "its digest is not that of what was saved")
