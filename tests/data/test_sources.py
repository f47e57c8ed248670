"""Records from every kind of place are the same records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tptrain.data.sources import load_records
from tptrain.data.word_problems import HELD_OUT_RECORDS, TRAINING_RECORDS, held_out_records, training_records

RECORDS: list[dict[str, Any]] = [
    {
        "prompt": f"{number}+1=",
        "completion": str(number + 1),
        "weight": number / 2,
        "note": None if number % 2 else "é",
    }
    for number in range(7)
]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=3)
    return path


def save_dataset(path: Path) -> Path:
    datasets.Dataset.from_list(RECORDS).save_to_disk(path)
    return path


def save_dataset_dict(path: Path) -> Path:
    train, test = datasets.Dataset.from_list(RECORDS), datasets.Dataset.from_list(RECORDS[:2])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(path)
    return path


WRITERS = {
    "jsonl": lambda folder: write_jsonl(folder / "a.jsonl", RECORDS),
    "json": lambda folder: write_jsonl(folder / "a.json", RECORDS),
    "parquet": lambda folder: write_parquet(folder / "a.parquet"),
    "Dataset": lambda folder: save_dataset(folder / "saved"),
    "DatasetDict": lambda folder: save_dataset_dict(folder / "saved"),
}


@pytest.mark.parametrize("max_records", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("kind", WRITERS)
def test_same_records_from_every_place(kind: str, max_records: int | None, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    assert load_records(str(path), None, "train", max_records) == RECORDS[:max_records]


def test_split_of_a_saved_dataset_dict(tmp_path: Path) -> None:
    path = save_dataset_dict(tmp_path / "saved")
    assert load_records(str(path), None, "test", None) == RECORDS[:2]


def test_blank_lines_and_missing_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}', encoding="utf-8")
    assert load_records(str(path), None, "train", None) == [{"a": 1}, {"a": 2}]


def test_first_records_are_read_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken\n', encoding="utf-8")
    assert load_records(str(path), None, "train", 2) == [{"a": 1}, {"a": 2}]


def test_builtin_word_problems() -> None:
    train = load_records("builtin:word_problems", None, "train", None)
    assert train == training_records(TRAINING_RECORDS, 0)
    assert load_records("builtin:word_problems", None, "train", 5) == train[:5]
    assert load_records("builtin:word_problems", None, "test", None) == held_out_records(HELD_OUT_RECORDS, 0)


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_records("~/a.jsonl", None, "train", None) == RECORDS


def test_gsm8k_is_whole(gsm8k: Path) -> None:
    assert len(load_records(str(gsm8k / "train.jsonl"), None, "train", None)) == 7473
    first = load_records(str(gsm8k / "test.jsonl"), None, "test", 1)
    assert sorted(first[0]) == ["answer", "question"]
