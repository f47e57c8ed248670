"""Rows from the cache are those that rendering makes; an entry is whole, and only for what made it."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.data import tokenizers_of_all_kinds as kinds
from tptrain.config.schema import DataSection
from tptrain.data import token_cache
from tptrain.data.dataset import TokenizedDataset, tokenize_records
from tptrain.data.sources import open_records
from tptrain.data.token_cache import cache_folder, entry_key, tokenized
from tptrain.data.word_problems import training_records
from tptrain.errors import ProblemsError

RECORDS = [*training_records(700, seed=2), {"question": "what?", "answer": " "}, {"question": "only"}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


@pytest.fixture
def section(tmp_path: Path, file: Path) -> DataSection:
    return DataSection(path=str(file), preset="gsm8k", seq_len=96, cache=str(tmp_path / "cache"))


def rows_of(
    section: DataSection, tokenizer: PreTrainedTokenizerFast, said: list[str] | None = None
) -> tuple[TokenizedDataset, Any]:
    records = open_records(section.path, None, "train", section.max_records)
    return tokenized(records, tokenizer, section, (said if said is not None else []).append)


def test_rows_are_those_in_memory_the_first_time_and_the_second(
    section: DataSection, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, counts = tokenize_records(RECORDS, tokenizer, section)
    said: list[str] = []
    first = rows_of(section, tokenizer, said)
    assert said == []
    monkeypatch.setattr(token_cache, "Fitting", None)  # nothing is rendered again
    second = rows_of(section, tokenizer, said)
    assert len(said) == 1 and "tokenised before" in said[0]
    for dataset, found in (first, second):
        assert isinstance(dataset.ids, np.memmap)
        assert found == counts
        assert dataset.digest() == expected.digest()
        assert (dataset.pad_id, dataset.stop_ids) == (expected.pad_id, expected.stop_ids)
    assert counts.dropped == {"column missing": 1, "empty completion": 1}


def test_an_entry_is_for_what_it_was_made_from_only(
    section: DataSection, file: Path, texts: list[str], tmp_path: Path
) -> None:
    def key(changed: DataSection = section, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
        records = open_records(changed.path, None, "train", changed.max_records)
        return entry_key(records, tokenizer or kinds.byte_level_with_bos(texts), changed)

    first = key()
    assert key() == first
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    assert key(replace(section, path=str(copy))) == first, "what a file is called makes no difference"
    assert key(replace(section, batch_rows=3, seed=9, packing="best_fit", cache="elsewhere")) == first
    with_template = kinds.byte_level_with_bos(texts)
    with_template.chat_template = "{{ messages }}"
    others = [
        *(key(replace(section, **change)) for change in ({"seq_len": 97}, {"too_long": "truncate"})),
        *(key(replace(section, **change)) for change in ({"as_chat": True}, {"loss_on": "all"})),
        *(key(replace(section, **change)) for change in ({"max_records": 5}, {"prompt_column": "a"})),
        key(tokenizer=kinds.byte_level_with_eos(texts)),
        key(tokenizer=with_template),
    ]
    file.write_bytes(file.read_bytes().replace(b"coins", b"coinz", 1))
    others.append(key())
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("part", ["ids", "loss_mask", "offsets", "rows.json"])
@pytest.mark.parametrize("damage", ["a bit", "shorter", "gone"])
def test_a_damaged_entry_is_made_anew(
    part: str, damage: str, section: DataSection, tokenizer: PreTrainedTokenizerFast
) -> None:
    digest = rows_of(section, tokenizer)[0].digest()
    (entry,) = Path(section.cache).iterdir()
    content = bytearray((entry / part).read_bytes())
    (entry / part).unlink()
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    if damage != "gone":
        (entry / part).write_bytes(content if damage == "a bit" else content[:-1])
    said: list[str] = []
    assert rows_of(section, tokenizer, said)[0].digest() == digest
    assert (said and "damaged" in said[0]) or (damage, part) == ("a bit", "rows.json")
    assert rows_of(section, tokenizer)[0].digest() == digest


def _in_a_process(section: DataSection, texts: list[str], start: float, results: Any) -> None:
    tokenizer = kinds.byte_level_with_bos(texts)
    time.sleep(max(0.0, start - time.time()))
    results.put(rows_of(section, tokenizer)[0].digest())


def test_two_writers_end_up_with_one_whole_entry(
    section: DataSection, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    start = time.time() + 12
    arguments = (section, texts, start, results)
    processes = [context.Process(target=_in_a_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    digests = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert len(list(Path(section.cache).iterdir())) == 1
    assert {*digests, rows_of(section, tokenizer)[0].digest()} == {digests[0]}


def test_the_second_of_two_writers_takes_the_firsts(
    section: DataSection, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes while this one is writing."""
    write, whole = token_cache._write, {}

    def late(entry: Path, *arguments: Any) -> None:
        write(entry, *arguments)
        whole[entry] = (entry / "ids").stat().st_ino
        write(entry, *arguments)

    monkeypatch.setattr(token_cache, "_write", late)
    rows_of(section, tokenizer)
    ((entry, inode),) = whole.items()
    assert (entry / "ids").stat().st_ino == inode
    assert list(entry.parent.iterdir()) == [entry]


def test_what_a_killed_process_left_is_removed_after_a_day(
    section: DataSection, tokenizer: PreTrainedTokenizerFast
) -> None:
    old, new = (Path(section.cache) / f"{name}.partial-x" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    rows_of(section, tokenizer)
    assert new.exists() and not old.exists()


def test_an_error_leaves_nothing(section: DataSection, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ProblemsError):
        rows_of(replace(section, prompt_column="nowhere"), tokenizer)
    assert list(Path(section.cache).iterdir()) == []


def test_a_folder_that_cannot_be_written(
    section: DataSection, tokenizer: PreTrainedTokenizerFast, file: Path
) -> None:
    with pytest.raises(ProblemsError, match=r"data\.cache=.*must be a folder that can be written"):
        rows_of(replace(section, cache=f"{file}/inside"), tokenizer)


def test_where_auto_keeps_entries(
    section: DataSection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = open_records(section.path, None, "train", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder(replace(section, cache="auto"), records) is None
    assert cache_folder(replace(section, cache="none"), records) is None
    monkeypatch.setattr(token_cache, "AUTO_BYTES", records.num_bytes() - 1)
    assert cache_folder(replace(section, cache="auto"), records) == tmp_path / "home" / "tptrain" / "data"
