"""Reading a checkpoint step: its JSON item, and its weights by slices or by blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import tensorstore as ts
import torch

from tptrain.backends.shards import Slices
from tptrain.ckpt.arrays import BLOCK_BYTES, is_chunk, open_array, to_numpy, to_torch
from tptrain.ckpt.digests import (
    MANIFEST,
    Damage,
    Manifest,
    ManifestError,
    damages,
    listing_damages,
    read_manifest,
)
from tptrain.ckpt.plain_chunks import ChunkDamage, plain_array
from tptrain.ckpt.steps import RUN, read_run
from tptrain.config.schema import LoraSection
from tptrain.config.state_parts import PARAMS
from tptrain.errors import Problem, ProblemsError, refuse
from tptrain.family import ParamRow
from tptrain.family.table import DTYPE_BYTES


@contextmanager
def readable(step_folder: Path, setting: str) -> Iterator[None]:
    """Turns what Orbax and tensorstore raise for files that they cannot read into a problem of the step."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise refuse(setting, step_folder, "must be readable", reason, "an intact step") from error


def lora_of(run: Mapping[str, Any]) -> LoraSection | None:
    """The adapters that a step's run trains, from its JSON item; None for a run without."""
    recipe = run.get("recipe", {})
    if not recipe.get("lora.rank"):
        return None
    targets = tuple(recipe["lora.targets"])
    return LoraSection(rank=recipe["lora.rank"], alpha=recipe["lora.alpha"], targets=targets)


def read_tree(item: Path) -> Mapping[str, Any]:
    """Name -> metadata (shape, dtype) of every array of an item; no values are read."""
    with ocp.StandardCheckpointer() as reader:
        tree: Mapping[str, Any] = reader.metadata(item.absolute()).item_metadata.tree
        return tree


def check_tree(
    item: Path, rows: Mapping[str, ParamRow], setting: str, any_float: bool = False
) -> list[Problem]:
    """Every array of an item that is missing, extra, of another shape or dtype; no values are read.

    any_float: any floating-point dtype will do.
    """
    found = read_tree(item)
    problems = []
    for name in sorted(set(rows) | set(found)):
        stored = str(found[name].dtype) if name in found else ""
        storage = stored if any_float and stored in DTYPE_BYTES else None
        there = f"{list(found[name].shape)} {stored}" if name in found else "nothing"
        row = rows.get(name)
        wanted = f"{list(row.size)} {storage or row.storage_dtype}" if row is not None else "nothing"
        if there != wanted:
            rule = f"{item.name}/{name} must be {wanted} as in the model's config"
            problems.append(
                Problem(setting, item.parent, rule, f"checkpoint has {there}", "a step of this model")
            )
    return problems


class StepSource:
    """A TensorSource over one item of a step: `params`, or a moment of the optimizer."""

    def __init__(self, item: Path):
        self._item, self._context = item, ts.Context()
        self._open: dict[str, ts.TensorStore] = {}

    def read(self, row: ParamRow, index: Slices) -> torch.Tensor:
        """The slice `index` of a row, in the dtype of the checkpoint."""
        return to_torch(self._array(row)[index].read().result())

    def read_into(self, row: ParamRow, index: Slices, out: torch.Tensor) -> None:
        """The slice `index` of a row, written to `out`, cast to its dtype."""
        target = ts.array(to_numpy(out))
        stored = self._array(row)[index]
        target.write(stored if stored.dtype == target.dtype else ts.cast(stored, target.dtype)).result()

    def rows_per_block(self, row: ParamRow) -> int:
        """Rows in a block: whole chunks of rows, as many as BLOCK_BYTES allows."""
        array = self._array(row)
        most = max(BLOCK_BYTES // max(math.prod(row.size[1:]) * array.dtype.numpy_dtype.itemsize, 1), 1)
        chunk = (array.chunk_layout.read_chunk.shape or (1,))[0] or 1
        return most if chunk > most else most - most % chunk

    def _array(self, row: ParamRow) -> ts.TensorStore:
        if row.name not in self._open:
            self._open[row.name] = open_array(self._item, row.name, self._context)
        return self._open[row.name]


class StepReader:
    """The weights of a step, read on the host row by row, each checked against the manifest.

    run: the JSON item of the step.
    """

    def __init__(
        self, step_folder: Path, setting: str = "checkpoint", unverified: bool = False, item: str = PARAMS
    ):
        """setting: where the user named the step. unverified: whether a step without a manifest will do.

        item: what is read, the weights or a moment of the optimizer.
        Raises ProblemsError for a missing manifest, and for damaged files other than the weights.
        """
        self._folder, self._setting = step_folder.absolute(), setting
        self._manifest = usable_manifest(self._folder, setting, unverified)
        if self._manifest is not None:
            items = (f"{RUN}/", f"{item}/")
            files = [path for path in self._manifest.files if path.startswith(items)]
            self._refuse_damaged([path for path in files if not is_chunk(path)])
        with readable(step_folder, setting):
            self.run = read_run(step_folder)
        self._item = item
        self._source = StepSource(self._folder / item)
        self._sliced: set[str] = set()

    def read(self, row: ParamRow, index: Slices | None = None) -> torch.Tensor:
        """One unpadded tensor in the format it was saved in, or a slice of it; nothing else is read.

        Of a tensor that is read by slices the files are checked once.
        """
        if index is None:
            return self._checked(row).read(row, tuple(slice(0, n) for n in row.size))
        if row.name not in self._sliced:
            self._checked(row)
            self._sliced.add(row.name)
        return self._source.read(row, index)

    def read_blocks(self, row: ParamRow) -> Iterator[torch.Tensor]:
        """A tensor as consecutive private blocks of whole rows; each file is read once.

        The blocks count for nothing until the last one has come: files are checked while they are read, and
        the ProblemsError for a damaged one comes after its blocks.
        """
        array = plain_array(self._folder / self._item, row.name)
        if array is None or array.shape != row.size:
            yield from self._read_chunks(row)
            return
        try:
            yield from array.blocks(self._manifest.files if self._manifest is not None else None)
        except ChunkDamage as error:
            raise damaged(self._folder, self._setting, error.damages) from error

    def _read_chunks(self, row: ParamRow) -> Iterator[torch.Tensor]:
        """The same for an array that only tensorstore can read: compressed, or in a layout of Orbax's own."""
        source = self._checked(row)
        rest = tuple(slice(0, n) for n in row.size[1:])
        with readable(self._folder, self._setting):
            step = source.rows_per_block(row)
        for start in range(0, row.size[0], step):
            with readable(self._folder, self._setting):
                block = source.read(row, (slice(start, min(start + step, row.size[0])), *rest))
            yield block
            del block

    def _checked(self, row: ParamRow) -> StepSource:
        if self._manifest is not None:
            folder = f"{self._item}/{row.name}/"
            self._refuse_damaged([path for path in self._manifest.files if path.startswith(folder)])
        return self._source

    def _refuse_damaged(self, paths: list[str]) -> None:
        assert self._manifest is not None
        found = damages(self._folder, self._manifest, paths)
        if found:
            raise damaged(self._folder, self._setting, found)


def usable_manifest(step_folder: Path, setting: str, unverified: bool) -> Manifest | None:
    """The manifest of a step whose files are all there; None where there is none and that was allowed."""
    try:
        manifest = read_manifest(step_folder)
    except FileNotFoundError as error:
        if unverified:
            return None
        rule = "must have a digest manifest, or nothing tells whether it is intact"
        fix = "another step, or --unverified to read it all the same"
        raise refuse(setting, step_folder, rule, f"no {MANIFEST} in it", fix) from error
    except ManifestError as error:
        raise damaged(step_folder, setting, [Damage(MANIFEST, str(error))]) from error
    found = listing_damages(step_folder, manifest)
    if found:
        raise damaged(step_folder, setting, found)
    return manifest


def damaged(step_folder: Path, setting: str, found: list[Damage]) -> ProblemsError:
    """The refusal of a step with damaged files."""
    rule, fix = "must hold what was saved", "another step of the run"
    return refuse(setting, step_folder, rule, describe(found), fix)


def describe(found: list[Damage], most: int = 3) -> str:
    """The damaged files in a few words."""
    shown = ", ".join(str(damage) for damage in found[:most])
    return shown if len(found) <= most else f"{shown} and {len(found) - most} more files"
