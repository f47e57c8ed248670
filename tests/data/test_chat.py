"""Conversations: ids are those of the chat template, and the mask is the assistant's turns to the token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers_of_all_kinds import (
    byte_level_with_bos,
    byte_level_with_eos,
    byte_level_with_lines,
    byte_level_without_bos,
    sentencepiece_like,
)
from tptrain.config.schema import DataSection
from tptrain.data.chat import (
    BEGUN_OTHERWISE,
    NO_QUESTION,
    REFUSED,
    REWRITTEN,
    UNENDED,
    ChatRenderer,
    chat_problems,
)
from tptrain.data.dataset import tokenize_records
from tptrain.data.records import conversation as conversation_of
from tptrain.data.render import Renderer, texts_of
from tptrain.data.rendered import BOUNDARY, EMPTY_COMPLETION, MISSING_COLUMN, NO_ANSWER, NOT_TEXT, Rendered
from tptrain.errors import ProblemsError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Form:
    """A way to write conversations, in Jinja over the message `m`.

    asked:  what begins a turn of the assistant's, written when a server asks for one.
    answer: what the model is to generate. after: what the template writes behind it.
    end:    the token that ends a turn.
    """

    question: str
    asked: str
    answer: str
    after: str
    special: tuple[str, ...]
    end: str = "{{ eos_token }}"

    def template(self, marked: bool = False) -> str:
        """marked: with `{% generation %}` around what is generated."""
        answer = self.answer + self.end
        if marked:
            answer = "{% generation %}" + answer + "{% endgeneration %}"
        return (
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
            + (self.asked + answer + self.after + "{% else %}" + self.question)
            + ("{% endif %}{% endfor %}{% if add_generation_prompt %}" + self.asked + "{% endif %}")
        )


# A new line behind a tag is Jinja's to drop, hence the expression.
_LINE = "{{ '\n' }}"
CHATML = Form(
    question="<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    asked="<|im_start|>assistant\n",
    answer="{{ m.content }}",
    after=_LINE,
    special=("<|im_start|>", "<|im_end|>"),
    end="<|im_end|>",
)
FORMS = {
    "ChatML": CHATML,
    "headers, as Llama 3's": Form(
        question="<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>",
        asked="<|header|>assistant<|/header|>\n\n",
        answer="{{ m.content | trim }}",
        after="",
        special=("<|header|>", "<|/header|>", "<|eot|>"),
        end="<|eot|>",
    ),
    "turns, as Gemma's": Form(
        question="<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
        asked="<start_of_turn>model\n",
        answer="{{ m.content | trim }}",
        after=_LINE,
        special=("<start_of_turn>", "<end_of_turn>"),
        end="<end_of_turn>",
    ),
    "[INST], as Mistral's": Form(
        question="[INST] {{ m.content }}[/INST]",
        asked="",
        answer=" {{ m.content }}",
        after="",
        special=("[INST]", "[/INST]"),
    ),
}
TOKENIZERS: dict[str, Callable[[list[str]], PreTrainedTokenizerFast]] = {
    "byte level, BOS": byte_level_with_bos,
    "byte level, spaces outside of offsets": byte_level_without_bos,
    "byte level, EOS appended": byte_level_with_eos,
    "byte level, lines are tokens": byte_level_with_lines,
    "sentencepiece-like": sentencepiece_like,
}
WORDS = [
    *("what", "is", "the", "sum", "of", "three", "and", "four", "it", "makes", "seven"),
    *("then", "add", "12", "€", "that", "naïve", "so", "many", "words"),
]


def tokenizer_of(form: Form, kind: str = "byte level, BOS", marked: bool = False) -> PreTrainedTokenizerFast:
    # Two blanks in a row are a token, which shows what becomes of blanks at the edge of a turn.
    made = TOKENIZERS[kind]([" ".join(WORDS), "then  "] * 3)
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, special=True) for t in form.special]}
    )
    made.chat_template = form.template(marked)
    return made


def conversation(seed: int, turns: int, system: bool = False) -> Messages:
    random = np.random.default_rng(seed)
    roles = ["system"] * system + ["user", "assistant"] * turns
    return [
        {"role": role, "content": " ".join(random.choice(WORDS, random.integers(1, 9)))} for role in roles
    ]


def encoded(tokenizer: PreTrainedTokenizerFast, messages: Messages, asked: bool = False) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=asked, return_dict=False)
    return ids


def assert_exact(tokenizer: PreTrainedTokenizerFast, messages: Messages, end: str, found: Rendered) -> None:
    """Ids are the template's; a counted run begins where a server's ids end, and is an answer and `end`."""
    ids = found.ids.tolist()
    assert ids == encoded(tokenizer, messages)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.loss_mask.astype(int), [0]])))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(runs) == len(answers)
    for (begin, stop), at in zip(runs, answers, strict=True):
        assert ids[:begin] == encoded(tokenizer, messages[:at], asked=True)
        assert ids[stop - 1] == tokenizer.convert_tokens_to_ids(end)
        assert tokenizer.decode(ids[begin : stop - 1]).strip() == messages[at]["content"]


def end_of(tokenizer: PreTrainedTokenizerFast, form: Form) -> str:
    return form.end if form.end in form.special else str(tokenizer.eos_token)


CHAT = DataSection(preset="chat")


def render_conversation(tokenizer: PreTrainedTokenizerFast, messages: Any) -> Rendered | str:
    found = conversation_of(messages, None, CHAT)
    return next(ChatRenderer(tokenizer).render([found]))


def rendered(tokenizer: PreTrainedTokenizerFast, messages: Messages) -> Rendered:
    found = render_conversation(tokenizer, messages)
    assert isinstance(found, Rendered), found
    return found


@pytest.mark.parametrize("marked", [False, True], ids=["by prefixes", "by generation blocks"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", FORMS)
def test_counted_are_the_answers_and_the_token_that_ends_each(name: str, kind: str, marked: bool) -> None:
    form = FORMS[name]
    tokenizer = tokenizer_of(form, kind, marked)
    for seed in range(12):
        messages = conversation(seed, 1 + seed % 4, system=seed % 3 == 0)
        assert_exact(tokenizer, messages, end_of(tokenizer, form), rendered(tokenizer, messages))


def _shifted(mask: np.ndarray, by: int) -> np.ndarray:
    return np.roll(mask, by)


def _without_ends(mask: np.ndarray, _: int) -> np.ndarray:
    return mask & np.append(mask[1:], False)


def _with_one_more(mask: np.ndarray, _: int) -> np.ndarray:
    return mask | np.insert(mask[:-1], 0, False)


def _without_last_turn(mask: np.ndarray, _: int) -> np.ndarray:
    last = int(np.flatnonzero(~mask[: np.flatnonzero(mask)[-1]])[-1])
    return mask & (np.arange(len(mask)) < last)


@pytest.mark.parametrize(
    ("change", "by"),
    [(_shifted, 1), (_shifted, -1), (_without_ends, 0), (_with_one_more, 0), (_without_last_turn, 0)],
)
@pytest.mark.parametrize("name", FORMS)
def test_the_comparison_sees_a_mask_that_is_off_by_a_token(
    name: str, change: Callable[[np.ndarray, int], np.ndarray], by: int
) -> None:
    form = FORMS[name]
    tokenizer, messages = tokenizer_of(form), [*conversation(5, 2), {"role": "user", "content": "then"}]
    found, end = rendered(tokenizer, messages), end_of(tokenizer, form)
    assert_exact(tokenizer, messages, end, found)
    wrong = replace(found, loss_mask=change(found.loss_mask, by))
    with pytest.raises(AssertionError):
        assert_exact(tokenizer, messages, end, wrong)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", FORMS)
def test_blocks_are_those_of_transformers(name: str, kind: str) -> None:
    tokenizer, messages = tokenizer_of(FORMS[name], kind, marked=True), conversation(7, 3)
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    found = rendered(tokenizer, messages)
    assert found.ids.tolist() == theirs["input_ids"]
    if "INST" in name and "outside" in kind:
        # transformers finds no token for the space that begins a block, and gives up.
        assert not any(theirs["assistant_masks"])
        return
    assert found.loss_mask.astype(int).tolist() == theirs["assistant_masks"]


def test_a_served_question_is_what_comes_before_the_answer() -> None:
    tokenizer, messages = tokenizer_of(CHATML), conversation(3, 1)
    found = rendered(tokenizer, messages)
    begin = int(np.flatnonzero(found.loss_mask)[0])
    assert found.ids[:begin].tolist() == Renderer(tokenizer, CHAT).question_ids(messages[0]["content"])


def test_a_new_line_among_the_added_tokens_ends_no_turn() -> None:
    """Gemma's tokenizers have one."""
    form = FORMS["turns, as Gemma's"]
    tokenizer, messages = tokenizer_of(form), conversation(2, 2)
    tokenizer.add_tokens([AddedToken("\n", special=False, normalized=False)])
    assert_exact(tokenizer, messages, form.end, rendered(tokenizer, messages))


def test_an_added_token_within_an_answer_ends_no_turn() -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.add_tokens([AddedToken("<table>", special=False)])
    messages = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "it<table>is"}]
    assert_exact(tokenizer, messages, CHATML.end, rendered(tokenizer, messages))
    tokenizer.chat_template = replace(CHATML, end="").template()
    assert render_conversation(tokenizer, messages) == UNENDED


def forgetful(marked: bool) -> PreTrainedTokenizerFast:
    """A template that leaves the thinking of earlier answers out."""
    answer = "{% if loop.last %}seven then {% endif %}{{ m.content }}"
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = replace(CHATML, answer=answer).template(marked)
    return tokenizer


def test_a_template_that_writes_earlier_turns_anew_is_found_out() -> None:
    records = [{"messages": conversation(seed, 1 + seed % 2)} for seed in range(5)]
    dataset, counts = tokenize_records(records, forgetful(marked=False), DataSection(preset="chat"))
    assert (len(dataset), counts.records, counts.dropped) == (3, 5, {REWRITTEN: 2})


def test_blocks_tell_the_turns_of_such_a_template() -> None:
    tokenizer, messages = forgetful(marked=True), conversation(1, 2)
    found = rendered(tokenizer, messages)
    answers = [f"{messages[1]['content']}<|im_end|>", f"seven then {messages[3]['content']}<|im_end|>"]
    assert tokenizer.decode(found.ids[found.loss_mask]) == "".join(answers)
    assert found.ids.tolist() == encoded(tokenizer, messages)


def test_a_template_that_begins_answers_otherwise_than_it_asks_is_found_out() -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = CHATML.template().replace("assistant\n{% endif", "assistant: {% endif")
    assert render_conversation(tokenizer, conversation(1, 1)) == BEGUN_OTHERWISE


@pytest.mark.parametrize("spaces", [" ", "  "])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_space_before_the_answer_that_joins_its_first_word_is_found_out(
    kind: str, marked: bool, spaces: str
) -> None:
    """A server would send the space as a token; offsets alone do not always tell."""
    tokenizer = tokenizer_of(replace(CHATML, asked=f"<|im_start|>assistant:{spaces}"), kind, marked)
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "makes seven"}]
    assert render_conversation(tokenizer, messages) == BOUNDARY


def test_an_unknown_token_across_the_beginning_of_an_answer_is_found_out() -> None:
    """It is the one that a server sends, but stands for characters of the answer, too."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["user assistant it is"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = Form("{{ m.content }}", "☃", "{{ m.content }}", "", ()).template()
    messages = [{"role": "user", "content": "it"}, {"role": "assistant", "content": "is"}]
    assert_exact(tokenizer, messages, "</s>", rendered(tokenizer, messages))
    messages[1]["content"] = "☂ is"
    assert render_conversation(tokenizer, messages) == BOUNDARY


def test_a_block_may_hold_the_line_behind_its_end() -> None:
    tokenizer = tokenizer_of(replace(CHATML, end="<|im_end|>" + _LINE, after=""), marked=True)
    messages = conversation(1, 2)
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    found = rendered(tokenizer, messages)
    assert found.loss_mask.astype(int).tolist() == theirs["assistant_masks"]
    assert tokenizer.decode(found.ids[-1:]) == "\n"
    assert found.loss_mask[-1]


def test_a_token_across_the_end_of_a_block_is_found_out() -> None:
    tokenizer = byte_level_with_bos(["then\n\n"] * 3)
    tokenizer.chat_template = replace(CHATML, end="<|eos|>" + _LINE).template(marked=True)
    assert len(tokenizer("\n\n", add_special_tokens=False).input_ids) == 1
    assert render_conversation(tokenizer, conversation(1, 1)) == BOUNDARY


def test_a_block_that_leaves_the_end_of_its_turn_out_is_found_out() -> None:
    tokenizer = tokenizer_of(CHATML)
    end = "<|im_end|>{% endgeneration %}"
    assert end in CHATML.template(marked=True)
    tokenizer.chat_template = CHATML.template(marked=True).replace(end, "{% endgeneration %}<|im_end|>")
    assert render_conversation(tokenizer, conversation(1, 2)) == UNENDED


def test_a_conversation_that_the_assistant_begins() -> None:
    messages = conversation(4, 2)[1:]
    assert messages[0]["role"] == "assistant"
    assert render_conversation(tokenizer_of(CHATML), messages) == NO_QUESTION
    marked = tokenizer_of(CHATML, marked=True)
    found = rendered(marked, messages)
    assert marked.decode(found.ids[found.loss_mask]) == "".join(
        f"{message['content']}<|im_end|>" for message in messages if message["role"] == "assistant"
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", NOT_TEXT),
        (["text"], NOT_TEXT),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], NOT_TEXT),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "a"}], NOT_TEXT),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], NOT_TEXT),
        ([], NO_ANSWER),
        ([{"role": "user", "content": "a"}], NO_ANSWER),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], EMPTY_COMPLETION),
    ],
)
def test_why_a_conversation_is_dropped(messages: Any, reason: str) -> None:
    assert render_conversation(tokenizer_of(CHATML), messages) == reason


@pytest.mark.parametrize("marked", [False, True])
def test_what_a_parquet_file_fills_in_is_left_out(marked: bool) -> None:
    tokenizer, messages = tokenizer_of(CHATML), conversation(6, 1)
    tokenizer.chat_template = CHATML.template(marked).replace(
        "{{ m.content }}", "{{ m.name }}{{ m.content }}"
    )
    filled = [{**message, "name": None} for message in messages]
    assert rendered(tokenizer, filled).ids.tolist() == encoded(tokenizer, messages)


def test_a_conversation_that_the_template_refuses_is_dropped() -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert render_conversation(tokenizer, conversation(0, 1)) == REFUSED


def test_a_data_set_of_conversations() -> None:
    tokenizer, section = tokenizer_of(CHATML), DataSection(preset="chat", seq_len=512)
    records = [{"messages": conversation(seed, 2)} for seed in range(5)] + [{"other": 1}]
    dataset, counts = tokenize_records(records, tokenizer, section)
    assert (len(dataset), counts.dropped) == (5, {MISSING_COLUMN: 1})
    for index in range(5):
        ids, mask = dataset.row(index)
        assert_exact(tokenizer, records[index]["messages"], CHATML.end, Rendered(ids, mask))
    texts = list(texts_of(records, section))
    assert len(texts) == 20
    assert texts[0] == records[0]["messages"][0]["content"]


def test_the_column_of_conversations_may_be_named() -> None:
    section = DataSection(preset="chat", prompt_column="turns")
    dataset, _ = tokenize_records([{"turns": conversation(0, 1)}], tokenizer_of(CHATML), section)
    assert len(dataset) == 1


def test_templates_by_name_need_a_default() -> None:
    tokenizer = tokenizer_of(CHATML)
    assert chat_problems(tokenizer) == []
    tokenizer.chat_template = {"default": CHATML.template(), "tool_use": ""}
    assert chat_problems(tokenizer) == []
    rendered(tokenizer, conversation(0, 2))
    tokenizer.chat_template = {"tool_use": ""}
    assert len(chat_problems(tokenizer)) == 1


@pytest.mark.parametrize(
    ("template", "fix"),
    [
        ("{{ raise_exception('no') }}", "conversations in the roles and the order"),
        (replace(CHATML, end="").template(), "ends the assistant's turn"),
    ],
)
def test_nothing_left_names_what_helps(template: str, fix: str) -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = template
    with pytest.raises(ProblemsError) as caught:
        tokenize_records([{"messages": conversation(0, 1)}], tokenizer, DataSection(preset="chat"))
    (problem,) = caught.value.problems
    assert "dropped: 1 " in problem.other
    assert fix in problem.fix
