"""Conversations: ids are those of the chat template, and the mask is the assistant's turns to the token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tptrain.config.schema import DataSection
from tptrain.data import chat
from tptrain.data.chat import NO_ANSWER, REFUSED, REWRITTEN, question_ids, render_conversation
from tptrain.data.dataset import tokenize_records
from tptrain.data.render import BOUNDARY, EMPTY_COMPLETION, MISSING_COLUMN, NOT_TEXT, all_texts
from tptrain.data.tokenizer import train_tokenizer
from tptrain.errors import ProblemsError

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}"

# Name -> (special tokens, template, text between the turns that is never counted, the turn's end).
TEMPLATES: dict[str, tuple[list[str], str, str]] = {
    "chatml": (
        ["<|im_start|>", "<|im_end|>"],
        _LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        + _END
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "headers": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "{{ bos_token }}"
        + _LOOP
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        + _END
        + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "turns": (
        ["<start_of_turn>", "<end_of_turn>"],
        "{{ bos_token }}"
        + _LOOP
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        + "{{ m.content | trim }}<end_of_turn>\n"
        + _END
        + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "inst": (
        ["[INST]", "[/INST]"],
        "{{ bos_token }}"
        + _LOOP
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        + "{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
        + _END,
        "<|eos|>",
    ),
}

WORDS = [
    "what",
    "is",
    "the",
    "sum",
    "of",
    "three",
    "and",
    "four",
    "it",
    "is",
    "seven",
    "then",
    "add",
    "two",
    "that",
    "makes",
    "nine",
    "ever",
    "so",
    "many",
    "words",
]


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(WORDS)] * 3, 400)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    made = train_tokenizer([" ".join(WORDS)] * 3, 400)
    special, template, _ = TEMPLATES[name]
    made.add_special_tokens({"additional_special_tokens": [AddedToken(t, special=True) for t in special]})
    made.chat_template = template
    return made


def conversation(seed: int, turns: int) -> list[dict[str, str]]:
    random = np.random.default_rng(seed)
    roles = ["user", "assistant"] * turns
    return [
        {"role": role, "content": " ".join(random.choice(WORDS, random.integers(1, 9)))} for role in roles
    ]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(20))
def test_counted_are_the_answers_and_the_token_that_ends_them(name: str, seed: int) -> None:
    tokenizer, messages = tokenizer_of(name), conversation(seed, 1 + seed % 4)
    rendered = render_conversation(tokenizer, messages)
    assert not isinstance(rendered, str)
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert rendered.ids.tolist() == expected
    # Every run of counted tokens is an answer, spelled as it was, and the end of its turn.
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.loss_mask.astype(int), [0]])))
    runs = [rendered.ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [tokenizer.decode(run).strip() for run in runs] == [a + TEMPLATES[name][2] for a in answers]
    assert all(tokenizer.decode(run[-1:]) == TEMPLATES[name][2] for run in runs)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_comes_before_an_answer_is_what_a_server_sends(name: str) -> None:
    tokenizer, messages = tokenizer_of(name), conversation(3, 1)
    rendered = render_conversation(tokenizer, messages)
    assert not isinstance(rendered, str)
    begin = int(np.flatnonzero(rendered.loss_mask)[0])
    assert rendered.ids[:begin].tolist() == question_ids(tokenizer, messages[0]["content"])


def test_a_template_that_forgets_earlier_turns_is_found_out(trained: PreTrainedTokenizerFast) -> None:
    """As those do that leave out the thinking of all answers but the last."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"][1].replace(
        "{{ m.content }}", "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
    )
    assert render_conversation(tokenizer, conversation(1, 2)) == REWRITTEN
    assert not isinstance(render_conversation(tokenizer, conversation(1, 1)), str)


def test_a_template_that_begins_answers_otherwise_than_a_server_is_found_out() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"][1].replace("assistant\n{% endif", "assistant: {% endif")
    assert render_conversation(tokenizer, conversation(1, 1)) == REWRITTEN


def test_a_token_across_the_beginning_of_an_answer_is_found_out() -> None:
    tokenizer = tokenizer_of("inst")
    tokenizer.chat_template = (
        _LOOP
        + "{% if m.role == 'user' %}{{ m.content }} the{% else %}"
        + ("{{ m.content }}{{ eos_token }}{% endif %}" + _END)
    )
    messages = [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "n"}]
    assert render_conversation(tokenizer, messages) == BOUNDARY


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", NOT_TEXT),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "a"}], NOT_TEXT),
        ([{"role": "user", "content": "a"}], NO_ANSWER),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], EMPTY_COMPLETION),
    ],
)
def test_why_a_conversation_is_dropped(messages: Any, reason: str) -> None:
    assert render_conversation(tokenizer_of("chatml"), messages) == reason


def test_a_conversation_that_the_template_refuses_is_dropped() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert render_conversation(tokenizer, conversation(0, 1)) == REFUSED


def test_a_data_set_of_conversations() -> None:
    tokenizer, section = tokenizer_of("turns"), DataSection(preset="chat", seq_len=512)
    records = [{"messages": conversation(seed, 2)} for seed in range(5)] + [{"other": 1}]
    dataset, counts = tokenize_records(records, tokenizer, section)
    assert (len(dataset), counts.dropped) == (5, {MISSING_COLUMN: 1})
    assert dataset.row(2)[0].tolist() == tokenizer.apply_chat_template(
        records[2]["messages"], tokenize=True, return_dict=False
    )
    texts = all_texts(records, section)
    assert len(texts) == 20 and texts[0] == records[0]["messages"][0]["content"]


def test_a_tokenizer_without_a_template_is_refused(trained: PreTrainedTokenizerFast) -> None:
    trained.chat_template = None
    records = [{"messages": conversation(0, 1)}]
    with pytest.raises(ProblemsError) as caught:
        tokenize_records(records, trained, DataSection(preset="chat"))
    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("data.preset", "chat")
    assert chat.chat_problems(tokenizer_of("chatml")) == []
