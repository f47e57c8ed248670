"""Validation records by content: stable, whatever their order, file, seed or copies."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tptrain.config import DataSection
from tptrain.data.sources import Record, Records, open_records
from tptrain.data.split import content_hash, split_records
from tptrain.errors import ProblemsError

SECTION = DataSection(path="train.jsonl", preset="gsm8k", validation=0.1)


def records(count: int = 2000) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} and {n + 7}?", "answer": f"It is {2 * n + 7}."} for n in range(count)]


def split(found: list[Record], section: DataSection) -> tuple[list[Record], list[Record]]:
    training, held_out = split_records(Records(lambda: iter(found), "made here"), section)
    return list(training), list(held_out)


def questions(found: list[dict[str, Any]]) -> set[str]:
    return {record["question"] for record in found}


def test_the_sides_do_not_depend_on_order_seed_or_what_else_is_there() -> None:
    training, held_out = split(records(), SECTION)
    assert len(training) + len(held_out) == 2000 and not questions(training) & questions(held_out)
    assert 150 <= len(held_out) <= 250, "a tenth, within four standard deviations"
    shuffled = random.Random(4).sample(records(), 2000)
    other_training, other = split(shuffled, replace(SECTION, seed=5))
    assert questions(other) == questions(held_out)
    assert other == [record for record in shuffled if record["question"] in questions(held_out)], "in order"
    assert other_training == [record for record in shuffled if record not in other]
    _, of_some = split(records()[500:900], SECTION)
    assert questions(of_some) == questions(held_out) & questions(records()[500:900])


def test_it_is_the_same_side_in_every_version() -> None:
    """Or records that were trained on would be held out once tptrain is updated."""
    hashes = [content_hash(record, ("question", "answer")) for record in records(3)]
    assert hashes == [8702765072699435048, 8149211120398407331, 9477193324529532388]


def test_the_parts_have_names_and_digests_of_their_own(tmp_path: Path) -> None:
    """Or the cache of tokenised records would take one for the other."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records(200)))
    whole = open_records(str(tmp_path / "a.jsonl"), None, "train", None)
    found = [whole.digest()]
    for share in (0.1, 0.2):
        found += [part.digest() for part in split_records(whole, replace(SECTION, validation=share))]
    assert len(set(found)) == 5


def test_copies_stay_together_also_with_other_columns_beside() -> None:
    copies = [{**record, "id": f"{n}-{record['question']}"} for n in range(3) for record in records(300)]
    training, held_out = split(copies, SECTION)
    assert set(Counter(record["question"] for record in held_out).values()) == {3}
    assert not questions(training) & questions(held_out)


def test_a_larger_share_holds_out_what_a_smaller_one_does() -> None:
    sides = [questions(split(records(), replace(SECTION, validation=v))[1]) for v in (0.02, 0.1, 0.5)]
    assert sides[0] < sides[1] < sides[2]


def test_parquet_and_jsonl_copies_are_split_alike(tmp_path: Path) -> None:
    """A parquet file has null where a JSONL file has nothing, also inside of messages."""
    chats = [
        {"messages": [{"role": "user", "content": f"é {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(400)
    ]
    chats[0]["messages"][0]["name"] = "Ann"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    section = DataSection(path="a", preset="chat", validation=0.1)
    held_out = []
    for name in ("a.jsonl", "a.parquet"):
        loaded = open_records(str(tmp_path / name), None, "train", None)
        held_out.append([r["messages"][0]["content"] for r in split_records(loaded, section)[1]])
    assert held_out[0] == held_out[1] and 10 < len(held_out[0]) < 90


def test_the_second_text_of_a_prompt_is_content_too() -> None:
    section = DataSection(path="a", preset="alpaca", validation=0.3)
    made = [{"instruction": "Add.", "input": f"{n}", "output": "sum"} for n in range(200)]
    training, held_out = split(made, section)
    assert training and held_out


@pytest.mark.parametrize(
    ("share", "fix"), [(1e-9, "a larger share, or eval.loss_path=FILE"), (0.999999, "a smaller share")]
)
def test_a_side_without_records_is_refused(share: float, fix: str) -> None:
    with pytest.raises(ProblemsError) as refused:
        split(records(20), replace(SECTION, validation=share))
    (problem,) = refused.value.problems
    assert (problem.setting, problem.value) == ("data.validation", share)
    assert "of 20 records" in problem.other and "both to train on and to hold out" in problem.rule
    assert fix in problem.fix
