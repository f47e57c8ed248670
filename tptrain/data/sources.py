"""Records from where the user keeps them: a file, a folder, the hub, or the embedded generator.

They are read one after the other, so that a data set may be larger than the memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from tptrain.data import word_problems
from tptrain.errors import ProblemsError, nearest, refuse, unknown_name

if TYPE_CHECKING:
    from datasets import Dataset

Record = dict[str, Any]

_BUILTIN = "builtin:"
_BUILTIN_SEED = 0
_JSONL = (".jsonl", ".json", ".ndjson")
_PARQUET = (".parquet",)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_ROWS_AT_A_TIME = 1024
_LOCAL_COPY = "the path of a local JSONL or parquet file"


@dataclass(frozen=True)
class Records:
    """The records of a data set, each a dict of columns; every iteration reads them anew, one after the
    other.

    read:   begins a reading.
    name:   what tells these records from others in the same files: the split, how many, which part.
    files:  what they are read from; none for records that are made.
    """

    read: Callable[[], Iterator[Record]]
    name: str
    files: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[Record]:
        return self.read()

    def part(self, name: str, belongs: Callable[[Record], bool]) -> Records:
        """Those for which `belongs` says so. name: of that rule."""
        return Records(lambda: filter(belongs, self.read()), f"{self.name}, {name}", self.files)

    def num_bytes(self) -> int:
        """The size of the files, whether or not all of it is read."""
        return sum(file.stat().st_size for file in self.files)

    def digest(self) -> str:
        """Hexadecimal XXH3-128 of the name and of all bytes of the files, whatever these are called."""
        digest = xxhash.xxh3_128(self.name.encode())
        for file in self.files:
            with file.open("rb") as content:
                while block := content.read(1 << 24):
                    digest.update(block)
            digest.update(b"end of file")
        return digest.hexdigest()


def load_records(
    path: str, subset: str | None, split: str, max_records: int | None, setting: str = "data.path"
) -> list[Record]:
    """All of `open_records`, in memory."""
    return list(open_records(path, subset, split, max_records, setting))


def open_records(
    path: str, subset: str | None, split: str, max_records: int | None, setting: str = "data.path"
) -> Records:
    """The first `max_records` records (all of them if None) of a data set.

    path:    a JSONL or parquet file, a folder saved by `datasets`, a hub id, or "builtin:word_problems".
    subset:  configuration of a hub data set. Anything else has none: the same recipe takes a local copy.
    split:   of a hub data set, a saved DatasetDict or a builtin. A file and a single saved Dataset have none.
    setting: what to call `path` in problems; those about subset and split are named after its section.

    Raises ProblemsError when the data cannot be found, or holds no record; a reading does when it comes to
    what it cannot read.
    """
    local = Path(path).expanduser()
    if path.startswith(_BUILTIN):
        made = _builtin(path, split, max_records, setting)
        records = Records(lambda: map(dict, made), f"{path}, {split}, {max_records}")
    elif local.is_dir():
        records = _rows(_saved_folder(local, split, setting), f"{split}, {max_records}", max_records)
    elif local.exists():
        records = _file(local, max_records, setting)
    elif _HUB_ID.match(path) and local.suffix not in (*_JSONL, *_PARQUET):
        records = _rows(_hub(path, subset, split, setting), f"{subset}, {split}, {max_records}", max_records)
    else:
        raise _missing(local, path, setting)
    if next(iter(records), None) is None:
        raise refuse(setting, path, "must hold at least one record", "it holds 0", "a data set with records")
    return records


def _builtin(path: str, split: str, max_records: int | None, setting: str) -> list[dict[str, str]]:
    if path != f"{_BUILTIN}word_problems":
        raise ProblemsError([unknown_name(setting, path, "builtin data set", [f"{_BUILTIN}word_problems"])])
    if split == "train":
        count, make = word_problems.TRAINING_RECORDS, word_problems.training_records
    elif split == "test":
        count, make = word_problems.HELD_OUT_RECORDS, word_problems.held_out_records
    else:
        raise _unknown_split(setting, split, ["train", "test"])
    return make(min(count, max_records or count), _BUILTIN_SEED)


def _file(path: Path, max_records: int | None, setting: str) -> Records:
    readers = {**dict.fromkeys(_JSONL, _jsonl), **dict.fromkeys(_PARQUET, _parquet)}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        rule, known = "must be a JSONL or parquet file", f"known endings: {', '.join(readers)}"
        raise refuse(setting, path, rule, known, "a file with one of these endings")

    def read() -> Iterator[Record]:
        try:
            yield from reader(path, max_records, setting)
        except OSError as error:
            other = error.strerror or str(error)
            raise refuse(setting, path, "must be readable", other, "a file that you may read") from error

    return Records(read, str(max_records), (path,))


def _jsonl(path: Path, max_records: int | None, setting: str) -> Iterator[Record]:
    """One JSON object per line; blank lines are passed over. Reads no further than it needs."""
    with path.open("rb") as lines:
        filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        parsed = ((number, _json_object(line)) for number, line in islice(filled, max_records))
        for number, found in parsed:
            if isinstance(found, str):
                more = sum(isinstance(rest, str) for _, rest in parsed)
                others = f", and {more} more such lines" if more else ""
                other = f"line {number}: {found}{others}"
                fix = f"valid JSON in line {number}, or a file without it"
                raise refuse(setting, path, "must hold one JSON object per line", other, fix)
            yield found


def _json_object(line: bytes) -> Record | str:
    """The object that a line holds, or what is wrong with the line."""
    try:
        parsed = json.loads(line.strip())
    except UnicodeDecodeError as error:
        return f"not UTF-8 text at byte {error.start}"
    except json.JSONDecodeError as error:
        return f"{error.msg} at column {error.colno}"
    return parsed if isinstance(parsed, dict) else f"a JSON {type(parsed).__name__}, not an object"


def _parquet(path: Path, max_records: int | None, setting: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows: Iterator[Record] = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from islice(rows, max_records)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        fix = "a parquet file that is complete"
        raise refuse(setting, path, "must be a parquet file", _first_line(error), fix) from error


def _saved_folder(folder: Path, split: str, setting: str) -> Dataset:
    import datasets

    fix = "a folder written by datasets' save_to_disk, or a JSONL or parquet file"
    is_saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    if not is_saved:
        found = sorted(path.name for path in folder.iterdir())
        other = f"it holds {', '.join(found[:5]) or 'nothing'}"
        raise refuse(setting, folder, "must be a folder saved by datasets", other, fix)
    try:
        saved = datasets.load_from_disk(str(folder))
    # What it raises for a damaged folder depends on the damage: a missing file, broken JSON, broken Arrow.
    except (OSError, ValueError, KeyError, TypeError) as error:
        other = f"{type(error).__name__}: {_first_line(error)}"
        raise refuse(setting, folder, "must be a complete folder saved by datasets", other, fix) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise _unknown_split(setting, split, saved)
        saved = saved[split]
    return saved


def _hub(path: str, subset: str | None, split: str, setting: str) -> Dataset:
    """A data set that `datasets` finds by its id: in its cache, or on the hub."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    rule = "must be a file or folder that exists, or the id of a data set that can be fetched"
    try:
        available: Dataset = datasets.load_dataset(path, subset, split=split)
    except (datasets.exceptions.DatasetNotFoundError, OSError, HfHubHTTPError) as error:
        other = f"no such path here; the hub: {_first_line(error)}"
        fix = f"{_LOCAL_COPY}, or an id while the hub can be reached"
        raise refuse(setting, path, rule, other, fix) from error
    except ValueError as error:  # a subset or split that the data set lacks; the message lists those it has
        section = setting.rpartition(".")[0]
        value = f"{path}, {section}.subset={subset}, {section}.split={split}"
        fix = "a subset and a split that the data set has"
        raise refuse(setting, value, "must have this subset and split", _first_line(error), fix) from error
    return available


def _rows(dataset: Dataset, name: str, max_records: int | None) -> Records:
    def read() -> Iterator[Record]:
        tables = dataset.with_format("arrow").iter(_ROWS_AT_A_TIME)
        return islice((row for table in tables for row in table.to_pylist()), max_records)

    return Records(read, name, tuple(Path(each["filename"]) for each in dataset.cache_files))


def _unknown_split(setting: str, split: str, known: Iterable[str]) -> ProblemsError:
    return ProblemsError([unknown_name(f"{setting.rpartition('.')[0]}.split", split, "split", known)])


def _missing(local: Path, path: str, setting: str) -> ProblemsError:
    """A path that is not there: names the first part that is missing, and what was perhaps meant."""
    present = next(parent for parent in local.absolute().parents if parent.exists())
    missing = local.absolute().relative_to(present).parts[0]
    siblings = [entry.name for entry in present.iterdir()] if present.is_dir() else []
    guess = nearest(missing, siblings)
    fix = f"{present / guess} (did you mean it?)" if guess else f"{_LOCAL_COPY}, or a hub id"
    return refuse(setting, path, "must exist", f"{present} holds no {missing}", fix)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
