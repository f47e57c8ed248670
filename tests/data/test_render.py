"""Ids and mask, made together: checked against what the text itself says."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers_of_all_kinds import across_words, byte_level_with_eos, byte_level_without_bos
from tptrain.config.schema import DataSection
from tptrain.data.pairs import encode_prompt, render_pairs
from tptrain.data.records import Pair, Record, check_columns, said
from tptrain.data.rendered import BOUNDARY, EMPTY_COMPLETION, MISSING_COLUMN, NOT_TEXT, Rendered
from tptrain.data.sources import load_records
from tptrain.data.word_problems import training_records

GSM8K = DataSection(preset="gsm8k")
PAIRS = [
    ("Question: Ann has 48 coins.\nAnswer:", " 48/2 = 24\n#### 24"),
    ("Crème brûlée\n", "für 3 Gäste"),
    ("日本語:", " 12 €, naïve"),
    ("a\n\n", "b"),
    ("no letters seen before: ßµ🙂\n", "🙂🙂 done"),
]


def render(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> Rendered | str:
    return render_pairs(tokenizer, [prompt], [completion])[0]


def texts_said(record: Record, section: DataSection) -> tuple[str, str]:
    """Prompt and completion of a record that has them."""
    found = said(record, section)
    assert isinstance(found, Pair), found
    return found.prompt, found.completion


def counted_text(tokenizer: PreTrainedTokenizerFast, rendered: Rendered) -> str:
    """The text that the mask counts, without EOS: what decoding the whole adds to decoding the prompt."""
    begin = int(rendered.ids[0] == tokenizer.bos_token_id)
    prompt = tokenizer.decode(rendered.ids[begin:][~rendered.loss_mask[begin:]])
    whole = tokenizer.decode(rendered.ids[begin:-1])
    assert whole.startswith(prompt)
    return str(whole[len(prompt) :])


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_counted_tokens_decode_to_the_completion(
    exact_tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    rendered = render(exact_tokenizer, prompt, completion)
    assert isinstance(rendered, Rendered)
    assert counted_text(exact_tokenizer, rendered) == completion
    assert rendered.ids[-1] == exact_tokenizer.eos_token_id
    assert rendered.loss_mask[-1]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_ids_are_the_encoding_of_the_whole_text_and_begin_with_the_served_prompt(
    exact_tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    rendered = render(exact_tokenizer, prompt, completion)
    assert isinstance(rendered, Rendered)
    ids, eos = rendered.ids.tolist(), exact_tokenizer.eos_token_id
    assert ids.count(eos) == 1
    assert ids[:-1] == [token for token in exact_tokenizer(prompt + completion).input_ids if token != eos]
    served = [token for token in exact_tokenizer(prompt).input_ids if token != eos]
    assert ids[: len(served)] == served == encode_prompt(exact_tokenizer, prompt)
    assert rendered.loss_mask.tolist() == [False] * len(served) + [True] * (len(ids) - len(served))


def test_bos_only_when_the_tokenizer_puts_it(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    with_bos, without = render(tokenizer, "a", " b"), render(byte_level_without_bos(texts), "a", " b")
    assert isinstance(with_bos, Rendered)
    assert isinstance(without, Rendered)
    assert with_bos.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert with_bos.ids[0] == tokenizer.bos_token_id
    assert len(without.ids) == len(with_bos.ids) - 1


def test_prompt_of_a_tokenizer_that_appends_eos_does_not_end(texts: list[str]) -> None:
    tokenizer = byte_level_with_eos(texts)
    assert tokenizer("How many?").input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encode_prompt(tokenizer, "How many?")


def test_token_across_the_boundary_is_dropped_not_guessed(texts: list[str]) -> None:
    tokenizer = across_words(texts)
    # The prompt ends inside what the tokenizer makes one token of.
    token = max(
        (token for token in tokenizer.get_vocab() if token not in tokenizer.all_special_tokens), key=len
    )
    assert render(tokenizer, token[:2], token[2:]) == BOUNDARY
    spans = tokenizer(token, return_offsets_mapping=True).offset_mapping
    assert any(start < 2 < end for start, end in spans)


def test_space_at_the_end_of_a_prompt_is_dropped_although_no_characters_overlap(texts: list[str]) -> None:
    # The offsets of " coins" leave its space out, so they alone would not show that the space changed sides.
    tokenizer = byte_level_without_bos(texts)
    spans = tokenizer("Answer: coins", return_offsets_mapping=True).offset_mapping
    assert all(not start < len("Answer: ") < end for start, end in spans)
    assert render(tokenizer, "Answer: ", "coins") == BOUNDARY
    assert isinstance(render(tokenizer, "Answer:", " coins"), Rendered)


def test_combining_letter_across_the_boundary_is_dropped(texts: list[str]) -> None:
    tokenizer = across_words([*texts, "cafe\u0301 cafe"])
    assert render(tokenizer, "cafe", "\u0301") == BOUNDARY


def test_eos_written_in_the_completion_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(tokenizer, "a", f" b{tokenizer.eos_token}")
    assert isinstance(rendered, Rendered)
    assert rendered.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_empty_prompt_counts_all_but_the_first_token(texts: list[str]) -> None:
    rendered = render(byte_level_without_bos(texts), "", "Ann has 3")
    assert isinstance(rendered, Rendered)
    assert rendered.loss_mask.tolist() == [False] + [True] * (len(rendered.ids) - 1)


def test_many_equals_one_by_one(exact_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, completions = zip(*PAIRS, strict=True)
    for together, alone in zip(
        render_pairs(exact_tokenizer, prompts, completions),
        [render(exact_tokenizer, *pair) for pair in PAIRS],
        strict=True,
    ):
        assert isinstance(together, Rendered)
        assert isinstance(alone, Rendered)
        np.testing.assert_array_equal(together.ids, alone.ids)
        np.testing.assert_array_equal(together.loss_mask, alone.loss_mask)


def test_docstring_example(tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"question": "1+1?", "answer": "2"}
    texts = texts_said(record, GSM8K)
    assert texts == ("Question: 1+1?\nAnswer:", " 2")
    rendered = render(tokenizer, *texts)
    assert isinstance(rendered, Rendered)
    tokens = tokenizer.convert_ids_to_tokens(rendered.ids)
    assert tokens == ["<|bos|>", "Question", ":", "Ġ", *"1+1?", "Ċ", "Answer", ":", "Ġ", "2", "<|eos|>"]
    assert rendered.loss_mask.astype(int).tolist() == [0] * 11 + [1] * 3


def test_chat_template_sends_what_was_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    record = training_records(1, seed=8)[0]
    turn = [{"role": "user", "content": record["question"]}]
    sent = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert sent == encode_prompt(tokenizer, texts_said(record, GSM8K)[0])
    answered = [*turn, {"role": "assistant", "content": record["answer"]}]
    rendered = render(tokenizer, *_texts(record))
    assert isinstance(rendered, Rendered)
    assert tokenizer.apply_chat_template(answered, return_dict=False) == rendered.ids.tolist()


def _texts(record: dict[str, str]) -> tuple[str, str]:
    texts = texts_said(record, GSM8K)
    assert not isinstance(texts, str)
    return texts


def test_presets_and_columns() -> None:
    record = {"prompt": "p", "completion": "c", "question": "q", "answer": "a", "text": "t"}
    assert texts_said(record, DataSection()) == ("p", "c")
    assert texts_said(record, GSM8K) == ("Question: q\nAnswer:", " a")
    assert texts_said(record, DataSection(prompt_column="text", completion_column="answer")) == ("t", "a")
    assert texts_said(record, DataSection(preset="gsm8k", prompt_column="text"))[0] == "Question: t\nAnswer:"


ALPACA = DataSection(preset="alpaca")
WITH_INPUT = "### Instruction:\nAdd.\n\n### Input:\n3, 4\n\n### Response:\n"
WITHOUT = "### Instruction:\nAdd.\n\n### Response:\n"


@pytest.mark.parametrize(
    ("more", "prompt"),
    [
        ({"input": "3, 4"}, WITH_INPUT),
        ({"input": ""}, WITHOUT),
        ({"input": " \n"}, WITHOUT),
        ({"input": None}, WITHOUT),
        ({}, WITHOUT),
    ],
)
def test_alpaca_has_a_form_with_and_one_without_input(more: dict[str, object], prompt: str) -> None:
    record = {"instruction": "Add.", "output": "7", **more}
    assert texts_said(record, ALPACA) == (prompt, "7")
    assert texts_said(record, ALPACA)[0] == prompt


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "Add.", "input": "3, 4"}, MISSING_COLUMN),
        ({"input": "3, 4", "output": "7"}, MISSING_COLUMN),
        ({"instruction": "Add.", "input": [3, 4], "output": "7"}, NOT_TEXT),
        ({"instruction": "Add.", "input": "3, 4", "output": " "}, EMPTY_COMPLETION),
    ],
)
def test_reasons_to_drop_an_instruction(record: dict[str, object], reason: str) -> None:
    assert said(record, ALPACA) == reason


@pytest.mark.parametrize("more", [{}, {"input": "48 + 3, {braces}"}])
def test_alpaca_counts_the_output_alone(
    exact_tokenizer: PreTrainedTokenizerFast, more: dict[str, str]
) -> None:
    texts = texts_said({"instruction": "How many coins?", "output": "51 coins.\n", **more}, ALPACA)
    assert not isinstance(texts, str)
    rendered = render(exact_tokenizer, *texts)
    assert isinstance(rendered, Rendered)
    assert counted_text(exact_tokenizer, rendered) == "51 coins.\n"


def test_columns_of_instructions_may_be_named_and_are_recognised() -> None:
    section = DataSection(preset="alpaca", prompt_column="task", completion_column="answer")
    assert texts_said({"task": "Add.", "answer": "7"}, section) == (WITHOUT, "7")
    problems = check_columns({"instruction", "input", "output"}, DataSection())
    assert {problem.fix for problem in problems} == {"data.preset=alpaca"}


def test_braces_in_a_record_are_kept() -> None:
    record = {"question": "What is {a} in {}?", "answer": "{0}"}
    assert texts_said(record, GSM8K) == ("Question: What is {a} in {}?\nAnswer:", " {0}")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "p"}, MISSING_COLUMN),
        ({"prompt": "p", "completion": None}, NOT_TEXT),
        ({"prompt": 3, "completion": "c"}, NOT_TEXT),
        ({"prompt": "p", "completion": ""}, EMPTY_COMPLETION),
        ({"prompt": "p", "completion": " \n"}, EMPTY_COMPLETION),
    ],
)
def test_reasons_to_drop(record: dict[str, object], reason: str) -> None:
    assert said(record, DataSection()) == reason


def test_missing_columns_are_reported_together() -> None:
    problems = check_columns({"text", "summary"}, DataSection())
    assert [problem.setting for problem in problems] == ["data.prompt_column", "data.completion_column"]
    assert all(problem.other == "columns: summary, text" for problem in problems)


def test_column_that_some_record_has_is_no_problem() -> None:
    assert not check_columns({"prompt", "completion"}, DataSection())


def test_gsm8k_masks_count_the_answers(gsm8k: object) -> None:
    records = load_records(f"{gsm8k}/train.jsonl", None, "train", 300)
    pairs = [_texts(record) for record in records]
    tokenizer = byte_level_without_bos([prompt + completion for prompt, completion in pairs])
    rendered = render_pairs(tokenizer, *zip(*pairs, strict=True))
    for one, (_, completion) in zip(rendered, pairs, strict=True):
        assert isinstance(one, Rendered)
        assert counted_text(tokenizer, one) == completion
