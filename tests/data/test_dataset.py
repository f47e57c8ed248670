"""Records as flat arrays: nothing lost without being counted."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tptrain.config.schema import DataSection
from tptrain.data.dataset import NOTHING_COUNTED, TOO_LONG, Counts, TokenizedDataset, tokenize_records
from tptrain.data.render import Renderer
from tptrain.data.rendered import BOUNDARY, EMPTY_COMPLETION, MISSING_COLUMN, NOT_TEXT, Rendered
from tptrain.data.sources import load_records
from tptrain.data.tokenizer import train_tokenizer
from tptrain.data.word_problems import training_records
from tptrain.errors import ProblemsError

GSM8K = DataSection(preset="gsm8k", seq_len=128)


def rendered(record: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> Rendered:
    row = next(Renderer(tokenizer, GSM8K)([record]))
    assert isinstance(row, Rendered)
    return row


def test_rows_are_what_the_render_function_makes(tokenizer: PreTrainedTokenizerFast) -> None:
    records = training_records(2500, seed=5)  # more than two chunks
    dataset, counts = tokenize_records(records, tokenizer, GSM8K)
    assert len(dataset) == counts.kept == counts.records == 2500
    for index in (0, 1, 1023, 1024, 2048, 2499):
        ids, mask = dataset.row(index)
        expected = rendered(records[index], tokenizer)
        np.testing.assert_array_equal(ids, expected.ids)
        np.testing.assert_array_equal(mask, expected.loss_mask)
    assert (dataset.ids.dtype, dataset.loss_mask.dtype, dataset.offsets.dtype) == (
        np.int32,
        np.bool_,
        np.int64,
    )
    assert counts.tokens == len(dataset.ids) == dataset.offsets[-1]
    assert counts.counted == dataset.loss_mask.sum()
    assert dataset.pad_id == tokenizer.pad_token_id


def test_every_dropped_record_is_counted_under_its_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    section = DataSection(seq_len=8, max_unlabelled=1)
    records = [
        {"prompt": "a", "completion": " b"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": None},
        {"prompt": "a"},
        {"prompt": "a ", "completion": "Ann"},
        {"prompt": "a", "completion": " 12345678"},
        {"prompt": "a", "completion": " c"},
    ]
    dataset, counts = tokenize_records(records, tokenizer, section)
    one_each = [BOUNDARY, EMPTY_COMPLETION, TOO_LONG, MISSING_COLUMN, NOT_TEXT]
    assert counts.dropped == dict.fromkeys(one_each, 1)
    assert (counts.records, counts.kept, len(dataset)) == (7, 2, 2)
    assert sum(counts.dropped.values()) + counts.kept == counts.records
    assert tokenizer.decode(dataset.row(1)[0], skip_special_tokens=True) == "a c"


def test_seq_len_is_the_longest_row_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"prompt": "a", "completion": " 123"}  # BOS a _ 1 2 3 EOS
    dataset, counts = tokenize_records([record], tokenizer, DataSection(seq_len=7))
    assert counts.tokens == 7
    assert dataset.row(0)[0][-1] == tokenizer.eos_token_id
    short = DataSection(seq_len=6, too_long="truncate")
    dataset, counts = tokenize_records([record], tokenizer, short)
    assert (counts.kept, counts.truncated, counts.dropped) == (1, 1, {})
    ids, mask = dataset.row(0)
    assert tokenizer.eos_token_id not in ids
    assert mask.tolist() == [False, False, True, True, True, True]


def test_truncation_that_leaves_only_the_prompt_is_a_drop(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"prompt": "1234567", "completion": " 8"}, {"prompt": "1", "completion": " 2"}]
    _, counts = tokenize_records(
        records, tokenizer, DataSection(seq_len=8, too_long="truncate", max_unlabelled=0.5)
    )
    assert (counts.kept, counts.truncated, counts.dropped) == (1, 0, {NOTHING_COUNTED: 1})


def test_counts_read_as_a_sentence() -> None:
    counts = Counts(7473, 7400, {TOO_LONG: 70, BOUNDARY: 3}, 0, 1_234_567, 876_543)
    assert str(counts) == (
        "7,473 records: 7,400 kept, 73 dropped (70 longer than seq_len, "
        "3 prompt and completion share a token), "
        "0 truncated; 1,234,567 tokens, 876,543 of them counted in the loss"
    )
    assert "0 dropped, 0 truncated" in str(Counts(2, 2, {}, 0, 9, 4))


def test_flat_arrays_give_back_rows_of_any_length() -> None:
    rows = [Rendered(np.arange(length, dtype=np.int32), np.arange(length) % 2 == 1) for length in (3, 1, 5)]
    dataset = TokenizedDataset.of(rows, pad_id=9)
    assert dataset.offsets.tolist() == [0, 3, 4, 9]
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(dataset.row(index)[0], row.ids)
        np.testing.assert_array_equal(dataset.row(index)[1], row.loss_mask)


def test_gsm8k_is_tokenised_fast_and_whole(gsm8k: Path) -> None:
    records = load_records(str(gsm8k / "train.jsonl"), None, "train", None)
    texts = [f"Question: {record['question']}\nAnswer: {record['answer']}" for record in records[:2000]]
    tokenizer = train_tokenizer(texts, 2048)
    start = time.process_time()
    dataset, counts = tokenize_records(records, tokenizer, DataSection(preset="gsm8k", seq_len=512))
    seconds = time.process_time() - start
    assert counts.records == 7473
    assert counts.kept > 7400
    assert set(counts.dropped) <= {TOO_LONG}
    assert counts.tokens > 150 * counts.kept
    # Thousands of records a second on an idle core; caches shared with busy neighbours cost most of that.
    assert len(records) / seconds > 500
    assert all(dataset.row(index)[1].any() for index in range(len(dataset)))


@pytest.mark.parametrize("max_length", [4, 16])
def test_limits_inside_a_tokenizer_file_do_not_cut(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> None:
    limited = train_tokenizer(texts, 600)
    limited.backend_tokenizer.enable_truncation(max_length)
    limited.backend_tokenizer.enable_padding(length=64)
    record = training_records(1, seed=2)[0]
    np.testing.assert_array_equal(rendered(record, limited).ids, rendered(record, tokenizer).ids)


def test_too_many_records_without_anything_to_learn_stop_the_run(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"prompt": "a", "completion": " b"}] * 8 + [{"prompt": "a", "completion": " "}] * 2
    tokenize_records(records, tokenizer, DataSection(max_unlabelled=0.2))
    with pytest.raises(ProblemsError) as caught:
        tokenize_records(records, tokenizer, DataSection(max_unlabelled=0.19))
    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("data.max_unlabelled", 0.19)
    assert problem.other == "2 of 10 records: 2 empty completion"
    assert problem.fix.startswith("data.max_unlabelled=0.2,")
    with pytest.raises(ProblemsError, match="max_unlabelled"):
        tokenize_records(records * 2, tokenizer, DataSection())
