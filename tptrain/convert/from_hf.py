"""From a Hugging Face folder to a checkpoint that training, generation and JAX read: OUT/checkpoints/0."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tptrain.backends.base import TORCH_DTYPES
from tptrain.ckpt.importing import write_step
from tptrain.config import ModelSection
from tptrain.config.model_config import ConfigsAtHand, choose_config
from tptrain.errors import Problem, raise_if_any, refuse
from tptrain.family import ParamRow, parameter_table, stored_rows
from tptrain.family.table import DTYPE_BYTES
from tptrain.hf_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    copy_tokenizer,
    require_tokenizer,
    tokenizer_files,
)
from tptrain.weights import SafetensorsSource, complete_config
from tptrain.weights.hf_json import generation_config, read_json, with_token_ids, write_json
from tptrain.weights.leftovers import partial_folder, recover, swap
from tptrain.weights.staging import staged_folder, writing

STEP = Path("checkpoints") / "0"
ASSETS = "assets"
STORAGE_DTYPE = "float32"

_SETTING, _OUT = "SOURCE", "OUT"
_VERSIONED = ("tptrain", "torch", "jax", "orbax-checkpoint", "transformers", "safetensors")
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class FolderModel:
    """The model in a Hugging Face folder: what a conversion reads.

    config: its config.json. dtypes: row name -> dtype in the files. name: the folder as the user named it.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    table: tuple[ParamRow, ...]
    source: SafetensorsSource
    dtypes: dict[str, str]

    @property
    def has_tokenizer(self) -> bool:
        return bool(tokenizer_files(self.folder))

    def num_bytes(self, dtype: str) -> int:
        """What the weights take in `dtype`."""
        return sum(row.num_elements for row in stored_rows(self.table)) * DTYPE_BYTES[dtype]


def open_folder(folder: Path, name: str, setting: str = _SETTING) -> FolderModel:
    """Open a model folder. Raises ProblemsError when it is incomplete, quantised, or no supported model."""
    config = read_json(folder / CONFIG_FILE, setting)
    chosen = choose_config(ModelSection(pretrained=name), ConfigsAtHand(checkpoint=config))
    raise_if_any(chosen.problems)
    assert chosen.facts is not None
    table = parameter_table(chosen.facts)
    source = SafetensorsSource(folder, table, setting)
    if tokenizer_files(folder):
        require_tokenizer(folder, setting)
    empty = {row.name: source.read(row, tuple(slice(0, 0) for _ in row.size)) for row in stored_rows(table)}
    dtypes = {name: _DTYPE_NAMES[tensor.dtype] for name, tensor in empty.items()}
    return FolderModel(folder, name, config, table, source, dtypes)


def storage_dtype(model: FolderModel, asked: str | None) -> str:
    """The dtype of the checkpoint: what was asked for, else float32 if that holds every value exactly."""
    if asked is not None:
        return asked
    too_wide = sorted(name for name, dtype in model.dtypes.items() if dtype == "float64")
    if too_wide:
        rule = f"must be a dtype that holds every value, or be asked for; {STORAGE_DTYPE} would round"
        other = f"{len(too_wide)} tensors are float64, such as {too_wide[0]}"
        raise refuse("--dtype", "not given", rule, other, f"float64, or {STORAGE_DTYPE} to have them rounded")
    return STORAGE_DTYPE


def convert_folder(
    model: FolderModel,
    out: Path,
    dtype: str,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Path:
    """Write `out` with the step `out/checkpoints/0` and `out/assets`; returns the step's folder.

    dtype:     of the weights in the checkpoint, from `storage_dtype`. Training with float32 master weights
               reads float32.
    overwrite: replace a folder that this function wrote; nothing else is replaced.
    progress:  told the bytes of weights written since its last call.

    `out` is complete or absent, however this process ends. Raises ProblemsError when it cannot be written,
    or when a value does not fit into `dtype`.
    """
    generation = _generation(model)
    config = with_token_ids(complete_config(model.config, dtype), generation)
    with _staged(out, model.num_bytes(dtype), overwrite) as folder, writing(out, _OUT):
        _write_assets(model, folder / ASSETS, generation)
        (folder / STEP).parent.mkdir()
        source = _FileRows(model.source, model.dtypes, dtype)
        write_step(folder / STEP, model.table, source, _run_item(model, config), dtype, progress)
    return out / STEP


def _generation(model: FolderModel) -> dict[str, Any]:
    """The folder's generation_config.json, with the token ids that only its config.json names."""
    path = model.folder / GENERATION_FILE
    given = read_json(path, _SETTING) if path.exists() else {}
    return generation_config(given, model.config, None)


def _write_assets(model: FolderModel, folder: Path, generation: dict[str, Any]) -> None:
    """Copy config, stop tokens and tokenizer; generation_config.json is written only if it must say more."""
    folder.mkdir()
    shutil.copyfile(model.folder / CONFIG_FILE, folder / CONFIG_FILE)
    copy_tokenizer(model.folder, folder)
    given = model.folder / GENERATION_FILE
    if given.exists() and read_json(given, _SETTING).keys() >= generation.keys():
        shutil.copyfile(given, folder / GENERATION_FILE)
    else:
        write_json(folder / GENERATION_FILE, generation)


def _run_item(model: FolderModel, config: dict[str, Any]) -> dict[str, Any]:
    """The step's `run` item: that of a run which has done nothing yet."""
    nothing: dict[str, Any] = {"seeds": {}, "recipe": {}, "mesh": {}}
    versions = {name: version(name) for name in _VERSIONED}
    made_from = {"name": model.name, "dtypes": sorted(set(model.dtypes.values()))}
    return {
        **nothing,
        "step": 0,
        "cursor": 0,
        "hf_config": config,
        "versions": versions,
        "source": made_from,
    }


class _FileRows:
    """A TensorSource for one who reads each row from its first to its last block, as `write_step` does.

    The files are read, not mapped: a mapping of a large file would count as memory of this process.
    """

    def __init__(self, source: SafetensorsSource, dtypes: dict[str, str], dtype: str):
        self._source, self._dtypes, self._dtype = source, dtypes, dtype
        self._blocks: Iterator[torch.Tensor] = iter(())

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        """The next rows of `row`, as many as `index` has, in the dtype of the checkpoint."""
        rows = index[0].stop - index[0].start
        if index[0].start == 0:
            row_bytes = row.num_elements // row.size[0] * DTYPE_BYTES[self._dtypes[row.name]]
            self._blocks = self._source.read_blocks(row, rows * row_bytes)
        with _reading(row):
            block = next(self._blocks)
        assert block.shape == (rows, *row.size[1:]), f"{row.name}: rows are read in order"
        return _cast(row, block, self._dtype)


@contextmanager
def _reading(row: ParamRow) -> Iterator[None]:
    """Turns a failed read into a problem of SOURCE; around a write it would be taken for one of OUT."""
    try:
        yield
    except OSError as error:
        rule, fix = "must be readable to the end", "an intact copy of it"
        raise refuse(_SETTING, row.name, rule, str(error), fix) from error


def _cast(row: ParamRow, block: torch.Tensor, dtype: str) -> torch.Tensor:
    cast = block.to(TORCH_DTYPES[dtype])
    limit = torch.finfo(cast.dtype).max
    if limit < torch.finfo(block.dtype).max and bool((cast.isinf() & block.isfinite()).any()):
        largest = block[block.isfinite()].abs().max().item()
        rule, fix = "must be able to hold every weight", "'bfloat16' or 'float32'"
        raise refuse("--dtype", dtype, rule, f"{row.name} has {largest:.6g}, the largest is {limit:.6g}", fix)
    return cast


@contextmanager
def _staged(out: Path, num_bytes: int, overwrite: bool) -> Iterator[Path]:
    """`staged_folder`, which replaces model folders only, for a folder of this module's own as well."""
    place = out.absolute()
    with writing(out, _OUT):
        recover(place)
    if not (overwrite and out.is_dir() and any(out.iterdir())):
        with staged_folder(out, _OUT, num_bytes, overwrite) as folder:
            yield folder
        return
    raise_if_any(_not_replaceable(out))
    with writing(out, _OUT), partial_folder(place) as partial:
        with staged_folder(partial / "content", _OUT, num_bytes) as folder:
            yield folder
        swap(place, partial / "content", partial)


def _not_replaceable(out: Path) -> list[Problem]:
    """Anything but what this module writes, such as a run: its steps are worth more than this conversion."""
    found = [*out.glob("*"), *(out / STEP).parent.glob("*")]
    files = {path.relative_to(out).as_posix() for path in found}
    if not out.is_symlink() and files == {"checkpoints", ASSETS, STEP.as_posix()}:
        return []
    rule = f"must be a folder with {ASSETS} and {STEP} alone to be replaced"
    other = "it is a link" if out.is_symlink() else f"it holds {', '.join(sorted(files)[:5])}"
    return [Problem(_OUT, out, rule, other, "another path, or remove it first")]
