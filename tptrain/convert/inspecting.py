"""What is in a checkpoint step or a Hugging Face folder, read without its values: as data and as a page."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tptrain.ckpt.digests import (
    ALGORITHM,
    MANIFEST,
    Manifest,
    ManifestError,
    damages,
    files_of,
    listing_damages,
    read_manifest,
)
from tptrain.ckpt.reading import read_tree, readable
from tptrain.ckpt.steps import RUN, read_run
from tptrain.config.state_parts import PARAMS
from tptrain.convert.progress import size_text
from tptrain.convert.sources import Found
from tptrain.errors import refuse
from tptrain.hf_files import INDEX_FILE, SINGLE_FILE
from tptrain.weights.safetensors_files import open_checkpoint
from tptrain.weights.safetensors_header import FLOAT_DTYPES
from tptrain.weights.stored_tensor import SlicedTensor, StoredTensor

RUN_FACTS = ("step", "cursor", "seeds", "mesh", "versions", "source")

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Array:
    """One array or tensor. dtype: as numpy and torch name it."""

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class ManifestState:
    """present, absent or damaged; files: how many it names. verified: whether every digest was compared.

    problems: what is wrong with the step, as sentences; metrics: the step's scores.
    """

    state: str
    files: int = 0
    algorithm: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    verified: bool = False
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """items: of a step, item name -> its arrays; of a folder, file name -> its tensors.

    disk_bytes: of all files. run, manifest: None for a folder.
    """

    path: Path
    kind: str
    items: Mapping[str, Mapping[str, Array]]
    disk_bytes: int
    run: Mapping[str, Any] | None = None
    manifest: ManifestState | None = None

    def total_bytes(self, item: str | None = None) -> int:
        """Bytes of the arrays of one item, or of all."""
        items = self.items.values() if item is None else [self.items[item]]
        return sum(array.num_bytes for arrays in items for array in arrays.values())


def inspect_found(found: Found, verify: bool = False) -> Contents:
    """What a step or a folder holds. verify: of a step, compare the digests of all its files."""
    if found.is_step:
        return inspect_step(found.folder, verify)
    if verify:
        rule, other = "needs digests to compare with", f"{found.folder} is a model folder, which has none"
        raise refuse("--verify", "given", rule, other, "no --verify")
    return inspect_folder(found.folder)


def inspect_step(step_folder: Path, verify: bool = False, setting: str = "PATH") -> Contents:
    """What a step holds. verify: read every file and compare its digest; otherwise no values are read.

    A damaged step is described, with what is wrong in its ManifestState; ProblemsError if it cannot be.
    """
    with readable(step_folder, setting):
        items = {name: step_arrays(step_folder / name) for name in item_names(step_folder)}
        run = read_run(step_folder)
    disk_bytes = _disk_bytes(step_folder, files_of(step_folder))
    return Contents(step_folder, "step", items, disk_bytes, run, manifest_state(step_folder, verify))


def item_names(step_folder: Path) -> list[str]:
    """The items of a step that hold arrays: the weights first, whatever the moments are called."""
    names = (path.name for path in step_folder.iterdir() if path.is_dir() and path.name != RUN)
    return sorted(names, key=lambda name: (name != PARAMS, name))


def step_arrays(item: Path) -> dict[str, Array]:
    """Name -> array of every array of an item of a step."""
    return {
        name: _array(tuple(metadata.shape), str(metadata.dtype), metadata.dtype.itemsize)
        for name, metadata in read_tree(item).items()
    }


def inspect_folder(folder: Path, setting: str = "PATH") -> Contents:
    """What a Hugging Face folder holds; no values are read. Raises ProblemsError when it is broken."""
    items: dict[str, dict[str, Array]] = {}
    for name, tensor in sorted(open_checkpoint(folder, setting).items()):
        items.setdefault(tensor.file, {})[name] = tensor_array(tensor)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Contents(folder, "folder", dict(sorted(items.items())), _disk_bytes(folder, files))


def tensor_array(tensor: StoredTensor | SlicedTensor) -> Array:
    """A tensor of a folder; dtypes other than floats keep the name that the format gives them."""
    dtype = FLOAT_DTYPES.get(tensor.dtype)
    name = str(dtype).removeprefix("torch.") if dtype else tensor.dtype
    return Array(tensor.shape, name, tensor.num_bytes)


def _array(shape: tuple[int, ...], dtype: str, itemsize: int) -> Array:
    return Array(shape, dtype, math.prod(shape) * itemsize)


def _disk_bytes(folder: Path, files: Iterable[str]) -> int:
    return sum(os.path.getsize(folder / name) for name in files)


def manifest_state(step_folder: Path, verify: bool) -> ManifestState:
    """The state of a step's digest manifest, and with `verify` of every file that it names."""
    try:
        manifest = read_manifest(step_folder)
    except FileNotFoundError:
        return ManifestState("absent")
    except ManifestError as error:
        return ManifestState("damaged", problems=(f"{MANIFEST} ({error})",))
    found = listing_damages(step_folder, manifest)
    if verify and not found:
        found = damages(step_folder, manifest, sorted(manifest.files))
    problems = tuple(str(damage) for damage in found)
    return _state(manifest, verify and not problems, problems)


def _state(manifest: Manifest, verified: bool, problems: tuple[str, ...]) -> ManifestState:
    return ManifestState(
        "present", len(manifest.files), ALGORITHM, dict(manifest.metrics), verified, problems
    )


def as_json(contents: Contents) -> dict[str, Any]:
    """Everything, each array by itself."""
    items = {
        item: {"bytes": contents.total_bytes(item), "arrays": {n: asdict(a) for n, a in arrays.items()}}
        for item, arrays in contents.items.items()
    }
    return {
        "path": str(contents.path),
        "kind": contents.kind,
        "items": items,
        "total_bytes": contents.total_bytes(),
        "disk_bytes": contents.disk_bytes,
        "run": contents.run,
        "manifest": asdict(contents.manifest) if contents.manifest else None,
    }


def as_page(contents: Contents) -> str:
    """The same for people: arrays that differ in their layer alone become one line."""
    lines = [f"{contents.path}: {_kind(contents)}"]
    for item, arrays in contents.items.items():
        dtypes = ", ".join(sorted({array.dtype for array in arrays.values()}))
        lines.append(f"  {item}: {len(arrays)} tensors, {dtypes}, {size_text(contents.total_bytes(item))}")
        alike = next(other for other, those in contents.items.items() if those == arrays)
        same = [f"the same tensors as {alike}"] if alike != item else _array_lines(arrays)
        lines += [f"    {line}" for line in same]
    lines.append(f"  total: {size_text(contents.total_bytes())}, files: {size_text(contents.disk_bytes)}")
    if contents.manifest is not None:
        lines += _manifest_lines(contents.manifest)
    if contents.run is not None:
        lines += [f"  {fact}: {shown(contents.run[fact])}" for fact in RUN_FACTS if fact in contents.run]
    return "\n".join(lines)


def _kind(contents: Contents) -> str:
    if contents.kind == "step":
        return "a checkpoint step"
    how = INDEX_FILE if (contents.path / INDEX_FILE).exists() else SINGLE_FILE
    tensors = sum(len(arrays) for arrays in contents.items.values())
    return f"a Hugging Face folder ({how}), {len(contents.items)} files, {tensors} tensors"


def _array_lines(arrays: Mapping[str, Array]) -> list[str]:
    groups: dict[tuple[str, Array], list[str]] = {}
    for name, array in arrays.items():
        groups.setdefault((_NUMBER.sub("*", name, count=1), array), []).append(name)
    return [
        f"{f'{len(names)} x {pattern}' if len(names) > 1 else names[0]}  "
        f"{list(array.shape)} {array.dtype}, {size_text(len(names) * array.num_bytes)}"
        for (pattern, array), names in groups.items()
    ]


def _manifest_lines(manifest: ManifestState) -> list[str]:
    if manifest.state == "absent":
        return ["  manifest: absent, so nothing tells whether the files are intact"]
    checked = "every digest is right" if manifest.verified else "digests not compared (--verify does)"
    about = f"{manifest.files} files, {manifest.algorithm}, {checked}"
    if manifest.problems:
        about = f"{len(manifest.problems)} problems: {'; '.join(manifest.problems)}"
    lines = [f"  manifest: {manifest.state}, {about}"]
    return [*lines, f"  metrics: {shown(manifest.metrics)}"] if manifest.metrics else lines


def shown(value: Any) -> str:
    """A fact in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items()) or "none"
    return str(value)
