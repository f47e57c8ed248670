"""`tptrain data inspect`: what it tells is what training sees, and what a server would be sent."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tptrain import cli
from tptrain.config.schema import DataSection
from tptrain.data.dataset import TOO_LONG
from tptrain.data.render import Renderer
from tptrain.data.rendered import EMPTY_COMPLETION, ROLES, Rendered
from tptrain.data.tokenizer import train_tokenizer
from tptrain.data.word_problems import training_records
from tptrain.inspection.findings import Findings, Lengths, inspect_records
from tptrain.inspection.pages import html_page, summary_lines

SECTION = DataSection(preset="gsm8k", seq_len=160)
GOOD = training_records(120, seed=4)
RECORDS: list[dict[str, Any]] = [
    GOOD[0],
    {"question": "What?", "answer": " "},
    {"question": "long <b> & so on? " * 60, "answer": "#### 1"},
    *GOOD[1:],
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|pad|>{{ m.role }}: {{ m.content }}<|eos|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [f"Question: {record['question']}\nAnswer: {record['answer']}" for record in GOOD]
    return train_tokenizer([*texts, "assistant: user: "], 500)


@pytest.fixture(scope="module")
def found(tokenizer: PreTrainedTokenizerFast) -> Findings:
    return inspect_records(RECORDS, tokenizer, SECTION, shown=3)


def test_rows_are_those_of_the_renderer(found: Findings, tokenizer: PreTrainedTokenizerFast) -> None:
    assert [example.number for example in found.examples] == [1, 4, 5]
    for example in found.examples:
        row = next(Renderer(tokenizer, SECTION, with_roles=True)([RECORDS[example.number - 1]]))
        assert isinstance(row, Rendered) and row.roles is not None
        assert [token.id for token in example.tokens] == row.ids.tolist()
        assert [token.counted for token in example.tokens] == row.loss_mask.tolist()
        assert [token.role for token in example.tokens] == [ROLES[role] for role in row.roles]
        assert "".join(token.text for token in example.tokens) == tokenizer.decode(row.ids)
        assert {token.role for token in example.tokens} == {"", "user", "assistant"}


def test_what_is_dropped_is_shown_once_for_each_reason(found: Findings) -> None:
    assert found.counts.dropped == {EMPTY_COMPLETION: 1, TOO_LONG: 1}
    assert {(example.number, example.reason) for example in found.dropped} == {
        (2, EMPTY_COMPLETION),
        (3, TOO_LONG),
    }
    assert not found.problems


def test_lengths_and_fillings(found: Findings, tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [len(row.ids) for row in Renderer(tokenizer, SECTION)(GOOD) if isinstance(row, Rendered)]
    assert found.lengths is not None
    assert sum(found.lengths.records) == len(GOOD) + 1, "the one that is too long is counted here"
    assert found.lengths.longest > SECTION.seq_len
    alone, packed = found.fillings["none"], found.fillings["best_fit"]
    assert alone.rows == len(GOOD) > packed.rows >= sum(lengths) / SECTION.seq_len
    assert alone.density == pytest.approx(sum(lengths) / (len(GOOD) * SECTION.seq_len))
    assert packed.records_per_row == pytest.approx(len(GOOD) / packed.rows)


def test_bins_hold_every_length_once() -> None:
    for lengths in ([1], [1, 1], [3, 7], list(range(1, 200)), [5, 1000, 1000]):
        found = Lengths.of(np.array(lengths))
        for begin, end, count in zip(found.edges[:-1], found.edges[1:], found.records, strict=True):
            assert count == sum(begin < length <= end for length in lengths)
        assert sum(found.records) == len(lengths)
        assert (found.median, found.longest) == (sorted(lengths)[(len(lengths) - 1) // 2], max(lengths))


def test_a_server_sends_the_ids_that_were_trained_on(found: Findings) -> None:
    served = found.served
    assert (served.endpoint, served.compared, served.same_prompt) == ("/v1/completions", 120, 120)
    assert served.begins_with == served.sent_begins_with == {"<|bos|>": 120}
    assert served.ends_with == {"<|eos|>": 120}
    assert (list(served.stops), served.unstopped) == (["<|eos|>"], 0)


def test_an_end_that_the_tokenizer_appends_to_prompts_is_found_out(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A server sends it, and the model would have to go on behind its own end."""
    appending = train_tokenizer([record["question"] for record in GOOD], 500)
    ids = [(name, appending.convert_tokens_to_ids(name)) for name in ("<|bos|>", "<|eos|>")]
    appending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", pair="<|bos|> $A $B <|eos|>", special_tokens=ids
    )
    served = inspect_records(GOOD, appending, SECTION, shown=0).served
    assert (served.compared, served.same_prompt) == (120, 0)


def test_rows_that_are_cut_end_with_nothing_that_stops(tokenizer: PreTrainedTokenizerFast) -> None:
    section = DataSection(preset="gsm8k", seq_len=60, too_long="truncate", max_unlabelled=1)
    found = inspect_records(GOOD, tokenizer, section, shown=0)
    assert found.counts.truncated == found.served.unstopped > 0


def test_conversations(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT
    section = DataSection(preset="gsm8k", as_chat=True, system_prompt="Reckon.", seq_len=200)
    found = inspect_records(GOOD, tokenizer, section, shown=1)
    assert found.served.endpoint == "/v1/chat/completions"
    assert found.served.same_prompt == found.served.compared == 120
    (example,) = found.examples
    by_role = {
        role: "".join(token.text for token in example.tokens if token.role == role)
        for role in ("system", "user", "assistant")
    }
    assert by_role["system"].endswith("system: Reckon.<|eos|>\n")
    assert by_role["user"] == f"<|pad|>user: {GOOD[0]['question']}<|eos|>\n"
    assert by_role["assistant"].startswith("<|pad|>assistant: ")
    counted = "".join(token.text for token in example.tokens if token.counted)
    assert counted == f"{GOOD[0]['answer']}<|eos|>"


def test_the_page_holds_the_same_and_needs_nothing_else(found: Findings) -> None:
    page = html_page(found, SECTION, "Data of <x>")
    assert "<title>Data of &lt;x&gt;</title>" in page
    assert not re.search(r"<script|<link|src=|href=|url\(|@import", page)
    rows = re.findall(r'<pre class="row">(.*?)</pre>', page, re.DOTALL)
    assert len(rows) == 5
    for example, row in zip(found.examples, rows, strict=False):
        spans = re.findall(
            r'<span class="t r\d( c)?" title="\d+: id (\d+), [^"]*">(.*?)</span>', row, re.DOTALL
        )
        assert [(bool(counted), int(token)) for counted, token, _ in spans] == [
            (token.counted, token.id) for token in example.tokens
        ]
        text = html.unescape("".join(text for _, _, text in spans)).replace("\u21b5", "")
        assert text == "".join(token.text for token in example.tokens)
    assert "long &lt;b&gt; &amp; so on?" in page
    for line in summary_lines(found, SECTION):
        assert html.escape(line) in page


def command(records: Path, *more: str) -> int:
    return cli.main(["data", "inspect", "recipes/tiny_gsm8k.py", f"data.path={records}", *more])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def test_the_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = file.parent / "pages" / "rows.html"
    assert command(file, "--rows", "2", f"--html={page}", "data.seq_len=160") == 0
    text = capsys.readouterr().out
    assert "122 records: 120 kept" in text
    assert f"<|bos|>Question: {GOOD[0]['question']}" in text.replace("\u21b5", "")
    assert page.read_text(encoding="utf-8").count('<pre class="row">') == 2 + 2
    assert command(file, "--json", "data.seq_len=160", "--rows=1") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["kept"] == 120 and len(found["examples"]) == 1


def test_each_source_has_its_own_findings(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = file.parent / "rows.html"
    sources = ("data.sources.all.split=train", "data.sources.few.max_records=10", "data.seq_len=160")
    assert command(file, *sources, f"--html={page}", "--rows=1") == 0
    text = capsys.readouterr().out
    first, second = text.split("all ---")[1].split("few ---")
    assert "122 records: 120 kept" in first and "10 records: 8 kept" in second
    assert page.with_name("rows-all.html").exists() and page.with_name("rows-few.html").exists()
    command(file, *sources, "--json")
    found = json.loads(capsys.readouterr().out)
    assert {name: each["counts"]["records"] for name, each in found.items()} == {"all": 122, "few": 10}
    assert command(file, *sources, "data.sources.few.prompt_column=questoin") == 2
    assert "data.sources.few.prompt_column=questoin" in capsys.readouterr().err


TURNS = {
    "chatml": "<|bos|><|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n",
    "turns": "<|bos|>User: {question}\nAssistant: {answer}<|eos|>\n",
}


@pytest.mark.parametrize("template", TURNS)
def test_a_chosen_template_on_a_base_tokenizer(
    template: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What counts is the answer and the token that ends the turn, and nothing of the new line behind it."""
    base, path = tmp_path / "base", tmp_path / "good.jsonl"
    tokenizer.save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    path.write_text("".join(json.dumps(record) + "\n" for record in GOOD), encoding="utf-8")
    form = ("data.preset=gsm8k", "data.as_chat=true", "data.seq_len=300", f"model.tokenizer={base}")
    assert command(path, "--json", *form, f"model.chat_template={template}") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["kept"] == 120 == found["served"]["same_prompt"]
    end = TURNS[template].rpartition("{answer}")[2].strip()
    for example, record in zip(found["examples"], GOOD, strict=False):
        tokens = example["tokens"]
        assert "".join(token["text"] for token in tokens) == TURNS[template].format(**record)
        counted = "".join(token["text"] for token in tokens if token["counted"])
        assert counted.removeprefix(" ") == record["answer"] + end
    assert end in found["served"]["stops"] and not found["served"]["unstopped"]


def test_what_a_run_would_refuse_is_shown_and_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(file, "data.max_unlabelled=0") == 2
    told = capsys.readouterr()
    assert "is dropped: empty completion" in told.out
    assert "data.max_unlabelled=0.0: is the largest share" in told.err
    assert command(file, "data.prompt_column=questoin") == 2
    assert "did you mean it?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["data"], "usage: tptrain data inspect"),
        (["data", "inspct"], "is not a command of data"),
        (["data", "inspect"], "recipe=none: is required"),
        (["data", "inspect", "recipes/tiny_gsm8k.py", "--rows", "x"], "--rows=x: must be a whole number"),
    ],
)
def test_what_is_called_wrongly(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    both = capsys.readouterr()
    assert told in both.out + both.err
