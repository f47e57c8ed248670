"""Publishing a committed step: the digests of all processes become its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tptrain.ckpt.digests import FileDigest, Manifest, digest_file, files_of, write_manifest
from tptrain.ckpt.host_array import HostArrayHandler
from tptrain.jaxside.hosts import barrier, is_primary, process_count, process_index

_PART = ".digests-{}.json"


def publish(
    step_folder: Path, step: int, metrics: Mapping[str, float], writers: Mapping[str, HostArrayHandler]
) -> None:
    """Write the manifest of a step that Orbax has committed; returns when it is there, in every process.

    writers: item name -> the handler that knows what this process has written.
    Raises OSError when a file is not there as it was written.
    """
    written = {
        f"{item}/{path}": digest
        for item, writer in writers.items()
        for path, digest in writer.digests.items()
    }
    everything = _gathered(step_folder, step, written)
    if is_primary():
        write_manifest(step_folder, Manifest(step, _complete(step_folder, everything), metrics))
    barrier(f"step {step} is published")


def _gathered(step_folder: Path, step: int, written: dict[str, FileDigest]) -> dict[str, FileDigest]:
    """The digests of all processes, for the primary one; they travel by files that it then removes."""
    count = process_count()
    if count == 1:
        return written
    if not is_primary():
        (step_folder / _PART.format(process_index())).write_text(json.dumps(written), encoding="utf-8")
    barrier(f"digests of step {step} are written")
    if not is_primary():
        return {}
    for process in range(1, count):
        part = step_folder / _PART.format(process)
        written |= {path: tuple(digest) for path, digest in json.loads(part.read_text("utf-8")).items()}
        part.unlink()
    return written


def _complete(step_folder: Path, written: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """The digest of every file of the step: as it was in memory, or read back for Orbax's own small files."""
    there = files_of(step_folder)
    missing = sorted(set(written) - set(there))
    if missing:
        raise OSError(f"{len(missing)} files are missing after the save, such as {missing[0]}")
    for path, (size, _) in written.items():
        found = (step_folder / path).stat().st_size
        if found != size:
            raise OSError(f"{path} has {found} bytes after the save, not {size}")
    return {path: written[path] if path in written else digest_file(step_folder / path) for path in there}
