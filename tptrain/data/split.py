"""Records set apart for validation, by what is in them.

Which side a record is on depends on its content alone: not on its place, on a seed, or on the file that it
lies in. So records that occur twice stay together, a file may be shuffled, cut or grown, and no record that
was trained on turns up among the held-out ones of a later run. A larger share holds out the records of a
smaller one, and more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import xxhash

from tptrain.config.schema import DataSection
from tptrain.data.records import MESSAGES, PRESETS, TOOLS, columns
from tptrain.data.sources import Record, Records
from tptrain.errors import refuse

_HASHES = 2**64


def split_records(records: Records, section: DataSection) -> tuple[Records, Records]:
    """(records to train on, held-out records), each in the order in which they come.

    The share is `data.validation`; what is held out may differ from it, as a sample of so many may.
    Raises ProblemsError where it leaves no record on one side.
    """
    limit = Fraction(repr(section.validation)) * _HASHES
    names = content_columns(section)

    def is_held_out(record: Record) -> bool:
        return content_hash(record, names) < limit

    share = f"{section.validation!r} by content of {', '.join(names)}"
    training = records.part(f"without {share}", lambda record: not is_held_out(record))
    held_out = records.part(share, is_held_out)
    for side, fix in (
        (held_out, "a larger share, or eval.loss_path=FILE in its place"),
        (training, "a smaller share"),
    ):
        if next(iter(side), None) is None:
            rule, count = "must leave records both to train on and to hold out", sum(1 for _ in records)
            other = f"held out by content: {count if side is training else 0} of {count} records"
            raise refuse("data.validation", section.validation, rule, other, fix)
    return training, held_out


def content_columns(section: DataSection) -> tuple[str, ...]:
    """The columns that a record is told apart by: those that the model is shown."""
    if section.preset in MESSAGES:
        more: str | None = TOOLS if section.tools_column == "auto" else section.tools_column
    else:
        more = PRESETS[section.preset].input_column
    return (*columns(section), *([more] if more else ()))


def content_hash(record: Mapping[str, Any], names: Sequence[str]) -> int:
    """XXH3-64 of these columns of a record as canonical JSON: keys sorted, empty ones left out, UTF-8.

    A column that a JSONL file lacks is null in a parquet file, so the two count as the same. Names of columns
    do not count, so that renaming one moves no record.
    """
    content = [_canonical(record.get(name)) for name in names]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(inner) for key, inner in value.items() if inner is not None}
    return [_canonical(inner) for inner in value] if isinstance(value, list | tuple) else value
