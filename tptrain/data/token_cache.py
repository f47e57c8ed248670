"""Tokenised records kept on the disk, and read from there as they are needed.

An entry is a folder, named by a digest of all that its rows depend on: the bytes of the records' files, the
tokenizer with its chat template, the settings that decide about rows, and the code and libraries that apply
them. So an entry is never out of date, and whoever has the same records finds it. It is written beside and
renamed: two processes that make the same one both end up with a whole one, and one that is killed leaves
none. What is in an entry is held against its own digest before it is used.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerFast

from tptrain.config.schema import DataSection
from tptrain.data.dataset import Counts, Fitting, TokenizedDataset, offsets_of, tokenize_records
from tptrain.data.rendered import Rendered
from tptrain.data.sources import Records
from tptrain.data.tokenizer import padding_id
from tptrain.errors import refuse

AUTO_BYTES = 64_000_000  # files above which `auto` keeps an entry
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
# Settings that decide about the rows, beside which records there are.
_SETTINGS = (
    *("preset", "prompt_column", "completion_column", "tools_column", "as_chat", "system_prompt", "loss_on"),
    *("seq_len", "too_long", "max_unlabelled"),
)
_ARRAYS = {"ids": np.dtype(np.int32), "loss_mask": np.dtype(np.bool_), "offsets": np.dtype(np.int64)}
_META = "rows.json"
_STALE_SECONDS = 24 * 3600  # after which a folder that was never finished belongs to nobody


def tokenized(
    records: Records,
    tokenizer: PreTrainedTokenizerFast,
    section: DataSection,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[TokenizedDataset, Counts]:
    """The rows of the records: from the cache, through the cache, or in memory, as `data.cache` says.

    Raises ProblemsError when the records do not allow it, or the named folder cannot be written.
    """
    folder = cache_folder(section, records)
    if folder is None:
        return tokenize_records(records, tokenizer, section)
    entry = folder / entry_key(records, tokenizer, section)
    found = _read(entry, say)
    if found is None:
        _write(entry, records, tokenizer, section)
        found = _read(entry, say)
        assert found is not None, f"{entry} was written just now"
    else:
        say(f"Data: tokenised before, read from {entry}.")
    return found


def cache_folder(section: DataSection, records: Records) -> Path | None:
    """Where the records' entry is kept; None where there is none."""
    if section.cache == "none":
        return None
    if section.cache != "auto":
        return Path(section.cache).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "tptrain" / "data" if records.num_bytes() > AUTO_BYTES else None


def entry_key(records: Records, tokenizer: PreTrainedTokenizerFast, section: DataSection) -> str:
    """Hexadecimal XXH3-128 of all that the rows depend on."""
    here = Path(__file__).parent
    template = tokenizer.chat_template
    parts = {
        "records": records.digest(),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": template,
        # A template may write the date.
        "today": time.strftime("%Y-%m-%d") if "strftime_now" in json.dumps(template) else "",
        "settings": {name: getattr(section, name) for name in _SETTINGS},
        # All of the package: a part that is left out would be one whose mending changes nothing.
        "code": {path.name: path.read_text(encoding="utf-8") for path in sorted(here.glob("*.py"))},
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return xxhash.xxh3_128(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write(entry: Path, records: Records, tokenizer: PreTrainedTokenizerFast, section: DataSection) -> None:
    """Tokenise into a new entry, a row at a time; another process's entry of the same name will do as
    well."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(entry.parent)
        partial = Path(tempfile.mkdtemp(prefix=f"{entry.name}.partial-", dir=entry.parent))
        try:
            fitting = Fitting(records, tokenizer, section)
            lengths = _write_rows(partial, fitting)
            offsets_of(lengths).tofile(partial / "offsets")
            dataset = _mapped(partial, padding_id(tokenizer), fitting.stop_ids)
            meta = {
                "counts": asdict(fitting.counts),
                "pad_id": dataset.pad_id,
                "stop_ids": dataset.stop_ids,
                "digest": dataset.digest(),
            }
            (partial / _META).write_text(json.dumps(meta), encoding="utf-8")
            _rename(partial, entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        rule, fix = "must be a folder that can be written", "another folder, or none for memory only"
        raise refuse("data.cache", section.cache, rule, f"{entry.parent}: {error.strerror}", fix) from error


def _write_rows(folder: Path, rows: Iterable[Rendered]) -> list[int]:
    lengths = []
    with (folder / "ids").open("wb") as ids, (folder / "loss_mask").open("wb") as masks:
        for row in rows:
            ids.write(row.ids.tobytes())
            masks.write(row.loss_mask.tobytes())
            lengths.append(len(row.ids))
    return lengths


def _rename(partial: Path, entry: Path) -> None:
    try:
        partial.rename(entry)
    except OSError:
        if not entry.is_dir():  # not there because another process was first
            raise


def _clear_stale(folder: Path) -> None:
    """Remove what killed processes have left."""
    for partial in folder.glob("*.partial-*"):
        if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _read(entry: Path, say: Callable[[str], None]) -> tuple[TokenizedDataset, Counts] | None:
    """The rows of an entry; None where there is none. One that is damaged is removed."""
    if not entry.is_dir():
        return None
    try:
        meta: dict[str, Any] = json.loads((entry / _META).read_text(encoding="utf-8"))
        dataset = _mapped(entry, meta["pad_id"], tuple(meta["stop_ids"]))
        whole = dataset.offsets[-1] == len(dataset.ids) == len(dataset.loss_mask)
        if whole and dataset.digest() == meta["digest"]:
            return dataset, Counts(**meta["counts"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass
    say(f"Data: {entry} is damaged; it is made anew.")
    shutil.rmtree(entry)
    return None


def _mapped(folder: Path, pad_id: int, stop_ids: tuple[int, ...]) -> TokenizedDataset:
    arrays = {name: np.memmap(folder / name, dtype, mode="r") for name, dtype in _ARRAYS.items()}
    return TokenizedDataset(**arrays, pad_id=pad_id, stop_ids=stop_ids)
