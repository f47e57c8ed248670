"""Bad inputs of the data package: what triggers each, and what its error must say in all five parts."""

from __future__ import annotations

import json
from pathlib import Path

import datasets

from tests.bad_input import BadInput as BadInput
from tests.data.tokenizers_of_all_kinds import byte_level_without_bos
from tptrain.config.schema import DataSection, ModelSection
from tptrain.data import sources
from tptrain.data.dataset import tokenize_records
from tptrain.data.sources import load_records
from tptrain.data.tokenizer import check_tokenizer, load_tokenizer, make_tokenizer, train_tokenizer
from tptrain.errors import raise_if_any

RECORDS = [{"question": "What is 48/2?", "answer": "#### 24"}] * 3
TEXTS = ["Question: What is 48/2?\nAnswer: #### 24"]


def load(path: str | Path, split: str = "train", subset: str | None = None) -> None:
    load_records(str(path), subset, split, None)


def load_text(folder: Path, text: str | bytes, name: str = "a.jsonl") -> None:
    content = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(content)
    load(folder / name)


def misspelt_file(folder: Path) -> None:
    (folder / "train.jsonl").write_text("{}")
    load(folder / "trian.jsonl")


def damaged_folder(folder: Path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    next((folder / "saved").glob("*.arrow")).write_bytes(b"no Arrow file")
    load(folder / "saved")


def folder_without_its_data(folder: Path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    next((folder / "saved").glob("*.arrow")).unlink()
    load(folder / "saved")


def foreign_folder(folder: Path) -> None:
    (folder / "notes.txt").write_text("")
    load(folder)


def misspelt_split(folder: Path) -> None:
    saved = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(folder / "saved")
    load(folder / "saved", split="tets")


def hub_split(folder: Path) -> None:
    """A data set that `datasets` finds by itself, as it would one in its cache."""
    (folder / "train.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    sources._hub(str(folder), None, "validation", "data.path")


def damaged_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    load_tokenizer(ModelSection(tokenizer=str(folder)))


def tokenizer_without_eos(_: Path) -> None:
    tokenizer = byte_level_without_bos(TEXTS)
    tokenizer.eos_token = None
    raise_if_any(check_tokenizer(tokenizer, 1000))


def broken_template(folder: Path) -> None:
    (folder / "chat.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    section = ModelSection(tokenizer="train", chat_template=str(folder / "chat.jinja"))
    make_tokenizer(section, TEXTS, 300)


def without_chat_template(_: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.chat_template = None
    tokenize_records([{"messages": []}], tokenizer, DataSection(preset="chat"))


def tokenise(records: list[dict[str, object]], **settings: object) -> None:
    section = DataSection(path="a.jsonl", **settings)  # type: ignore[arg-type]
    tokenize_records(records, train_tokenizer(TEXTS, 300), section)


MUST_EXIST, ONE_OBJECT = "must exist", "must hold one JSON object per line"
TOKENIZER_FILES = "tokenizer.json and tokenizer_config.json"

BAD_INPUTS: list[BadInput] = [
    # Where the records are.
    BadInput(
        "file that is not there", lambda tmp: load(tmp / "records.jsonl"),
        "data.path", "/records.jsonl", MUST_EXIST, "holds no records.jsonl", "the path of a local JSONL",
    ),
    BadInput(
        "misspelt file", misspelt_file,
        "data.path", "/trian.jsonl", MUST_EXIST, "holds no trian.jsonl", "/train.jsonl (did you mean it?)",
    ),
    BadInput(
        "folder on the way that is not there", lambda tmp: load(tmp / "sets" / "x" / "a.jsonl"),
        "data.path", "/sets/x/a.jsonl", MUST_EXIST, "holds no sets", "the path of a local JSONL",
    ),
    BadInput(
        "file of another kind", lambda tmp: load_text(tmp, "a,b\n", "a.csv"),
        "data.path", "/a.csv", "must be a JSONL or parquet file", "known endings: .jsonl", "these endings",
    ),
    BadInput(
        "unknown builtin", lambda _: load("builtin:word_problem"),
        "data.path", "builtin:word_problem", "is not a known builtin data set",
        "known: builtin:word_problems", "'builtin:word_problems' (did you mean it?)",
    ),
    BadInput(
        "hub out of reach", lambda _: load("nobody/no-such-set"),
        "data.path", "nobody/no-such-set", "file or folder that exists, or the id of a data set",
        "no such path here; the hub: Couldn't reach 'nobody/no-such-set'", "the path of a local JSONL",
    ),
    BadInput(
        "hub data set without the split", hub_split,
        "data.path", "data.subset=None, data.split=validation", "must have this subset and split",
        'Unknown split "validation"', "a subset and a split that the data set has",
    ),
    BadInput(
        "unknown split of a saved folder", misspelt_split,
        "data.split", "tets", "is not a known split", "known: test, train", "'test' (did you mean it?)",
    ),
    BadInput(
        "unknown split of the builtin", lambda _: load("builtin:word_problems", split="validation"),
        "data.split", "validation", "is not a known split", "known: test, train", "a name from that list",
    ),
    # What the files hold.
    BadInput(
        "empty file", lambda tmp: load_text(tmp, ""),
        "data.path", "/a.jsonl", "must hold at least one record", "it holds 0", "a data set with records",
    ),
    BadInput(
        "broken JSON line", lambda tmp: load_text(tmp, '{"a": 1}\n\n{"a": 2\n'),
        "data.path", "/a.jsonl", ONE_OBJECT, "line 3: Expecting ',' delimiter at column 8",
        "valid JSON in line 3",
    ),
    BadInput(
        "several broken JSON lines", lambda tmp: load_text(tmp, '{"a": 1}\nb\n{"a": 2}\nc\nd\n'),
        "data.path", "/a.jsonl", ONE_OBJECT, "line 2: Expecting value at column 1, and 2 more such lines",
        "valid JSON in line 2",
    ),
    BadInput(
        "line that is no object", lambda tmp: load_text(tmp, '{"a": 1}\n["b"]\n'),
        "data.path", "/a.jsonl", ONE_OBJECT, "line 2: a JSON list, not an object", "valid JSON in line 2",
    ),
    BadInput(
        "line that is not UTF-8", lambda tmp: load_text(tmp, b'{"a": "\xe9"}\n'),
        "data.path", "/a.jsonl", ONE_OBJECT, "line 1: not UTF-8 text at byte 7", "valid JSON in line 1",
    ),
    BadInput(
        "file that is no parquet", lambda tmp: load_text(tmp, '{"a": 1}\n', "a.parquet"),
        "data.path", "/a.parquet", "must be a parquet file", "Parquet", "a parquet file that is complete",
    ),
    BadInput(
        "folder that datasets did not save", foreign_folder,
        "data.path", "", "must be a folder saved by datasets", "it holds notes.txt", "save_to_disk",
    ),
    BadInput(
        "damaged folder", damaged_folder,
        "data.path", "/saved", "must be a complete folder saved by datasets", "Arrow", "save_to_disk",
    ),
    BadInput(
        "folder without its data", folder_without_its_data,
        "data.path", "/saved", "must be a complete folder saved by datasets", "No such file", "save_to_disk",
    ),
    # Columns and rows.
    BadInput(
        "misspelt column", lambda _: tokenise([{"question": "q", "anwser": "a"}], preset="gsm8k"),
        "data.completion_column", "answer", "must be a column of the records", "columns: anwser, question",
        "'anwser' (did you mean it?)",
    ),
    BadInput(
        "columns of another preset", lambda _: tokenise(list(RECORDS), completion_column="answer"),
        "data.prompt_column", "prompt", "must be a column of the records", "columns: answer, question",
        "data.preset=gsm8k",
    ),
    BadInput(
        "every record too long", lambda _: tokenise(list(RECORDS), preset="gsm8k", seq_len=4),
        "data.path", "a.jsonl", "must leave a record to train on", "dropped: 3 longer than seq_len",
        "data.seq_len=",
    ),
    BadInput(
        "no record with text", lambda _: tokenise([{"prompt": "p", "completion": 5}]),
        "data.path", "a.jsonl", "must leave a record to train on", "dropped: 1 not text", "non-empty texts",
    ),
    BadInput(
        "prompts that end in the space of the completion",
        lambda _: tokenise([{"prompt": "Question: ", "completion": "What"}]),
        "data.path", "a.jsonl", "must leave a record to train on",
        "dropped: 1 prompt and completion share a token", "completions that begin with it",
    ),
    BadInput(
        "conversations without a chat template", without_chat_template,
        "data.preset", "chat", "needs a tokenizer with a chat template", "the tokenizer 'train' has none",
        "prompt_completion, model.chat_template=chatml",
    ),
    BadInput(
        "conversations given to another preset",
        lambda _: tokenise([{"messages": []}], completion_column="messages"),
        "data.prompt_column", "prompt", "must be a column of the records", "columns: messages",
        "data.preset=chat",
    ),
    BadInput(
        "conversations without an answer",
        lambda _: tokenise([{"messages": [{"role": "user", "content": "What?"}]}], preset="chat"),
        "data.path", "a.jsonl", "must leave a record to train on", "dropped: 1 no turn of the assistant",
        "of which the assistant's are non-empty texts",
    ),
    # Tokenizers.
    BadInput(
        "tokenizer of no checkpoint", lambda _: load_tokenizer(ModelSection()),
        "model.tokenizer", "pretrained", "needs a checkpoint to take it from", "model.pretrained=none",
        '"train"',
    ),
    BadInput(
        "folder without a tokenizer", lambda tmp: load_tokenizer(ModelSection(pretrained=str(tmp))),
        "model.pretrained", "", "must hold a tokenizer", "it has no tokenizer files", "tokenizer.json",
    ),
    BadInput(
        "tokenizer file that does not parse", lambda tmp: damaged_tokenizer(tmp, '{"version": '),
        "model.tokenizer", "", "must hold a tokenizer", "transformers: JSONDecodeError: ", TOKENIZER_FILES,
    ),
    BadInput(
        "tokenizer file of an unknown model",
        lambda tmp: damaged_tokenizer(tmp, '{"added_tokens": [], "model": {"type": "None"}}'),
        "model.tokenizer", "", "must hold a tokenizer", "transformers: Exception: ", TOKENIZER_FILES,
    ),
    BadInput(
        "tokenizer on the hub, out of reach", lambda _: load_tokenizer(ModelSection(tokenizer="nobody/none")),
        "model.tokenizer", "nobody/none", "must be a folder, or a hub id", "the hub: ", "a local folder",
    ),
    BadInput(
        "tokenizer larger than the model",
        lambda _: raise_if_any(check_tokenizer(train_tokenizer(TEXTS, 270), 264)),
        "model.tokenizer", "train", "must have no id beyond the model's vocabulary", "vocab_size=264",
        "model.config.vocab_size=270",
    ),
    BadInput(
        "chat template that does not compile", broken_template,
        "model.chat_template", "chat.jinja", "must be a Jinja template", "line 2: unexpected '}'",
        "a template that compiles",
    ),
    BadInput(
        "tokenizer without end", tokenizer_without_eos,
        "model.tokenizer", "train", "must have an end-of-sequence token", "its eos_token is none",
        '"eos_token"',
    ),
    BadInput(
        "vocabulary too small to train for", lambda _: train_tokenizer(TEXTS, 200),
        "model.config.vocab_size", "200", "is too small to train a tokenizer for", "259", "259 or more",
    ),
]  # fmt: skip
