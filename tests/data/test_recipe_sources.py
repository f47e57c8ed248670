"""The sources of a recipe: read, set apart and told of one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tptrain.config.schema import DataSection, SourceSection
from tptrain.data.recipe_sources import open_sources, texts_of_sources
from tptrain.data.sources import open_records
from tptrain.data.split import split_records
from tptrain.errors import ProblemsError

RECORDS = [{"question": f"What is {n}+{n}?", "answer": f"#### {2 * n}"} for n in range(60)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_texts_for_a_tokenizer_are_of_all_sources(file: Path) -> None:
    other = file.with_name("b.jsonl")
    other.write_text(json.dumps({"prompt": "Say", "completion": " hello"}) + "\n")
    sources = {"b": SourceSection(path=str(other)), "a": SourceSection(path=str(file), preset="gsm8k")}
    texts = list(texts_of_sources(open_sources(DataSection(sources=sources))))
    assert texts[0] == "Question: What is 0+0?\nAnswer: #### 0"
    assert len(texts) == 61 and texts[-1] == "Say hello"


def test_each_source_is_split_as_it_would_be_alone(file: Path) -> None:
    sources = {"a": SourceSection(), "few": SourceSection(max_records=30)}
    data = DataSection(path=str(file), preset="gsm8k", validation=0.3, sources=sources)
    for source, count in zip(open_sources(data), (60, 30), strict=True):
        alone = split_records(open_records(str(file), None, "train", count), data)
        assert source.held_out is not None
        assert [list(source.records), list(source.held_out)] == [list(side) for side in alone]


def test_the_same_path_twice_is_fine(file: Path) -> None:
    sources = {name: SourceSection(path=str(file)) for name in ("a", "b")}
    assert [len(list(source.records)) for source in open_sources(DataSection(sources=sources))] == [60, 60]


@pytest.mark.parametrize(
    ("source", "setting", "other"),
    [
        (SourceSection(path="nowhere/a.jsonl"), "data.sources.web.path", "holds no nowhere"),
        (SourceSection(path="builtin:word_problems", split="tset"), "data.sources.web.split", "train"),
        (SourceSection(max_records=1), "data.validation", "source web"),
    ],
)
def test_problems_name_the_source(
    source: SourceSection, setting: str, other: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    data = DataSection(path=str(file), preset="gsm8k", validation=0.3, sources={"web": source})
    with pytest.raises(ProblemsError) as caught:
        open_sources(data)
    (problem,) = caught.value.problems
    assert problem.setting == setting and other in problem.other and problem.fix
