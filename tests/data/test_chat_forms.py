"""A thousand conversations in each form of chat: ids, mask and roles, held against forms written in
Python."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.data import tokenizers_of_all_kinds as kinds
from tests.data.chat_forms import CHAT_FORMS, ChatForm, Piece
from tptrain.config.schema import DataSection
from tptrain.data.chat import ChatRenderer
from tptrain.data.records import Conversation, conversation
from tptrain.data.rendered import BOUNDARY, ROLES, Rendered

CONVERSATIONS = 1000
SECTION = DataSection(preset="chat")
KINDS = {
    "headers": kinds.byte_level_with_lines,
    "chatml": kinds.byte_level_with_lines,
    "default_system": kinds.byte_level_with_bos,
    "turns": kinds.sentencepiece_like,
    "inst": kinds.sentencepiece_like,
    "tools": kinds.byte_level_with_bos,
}
WORDS = (
    *("what", "is", "the", "sum", "of", "three", "and", "four", "it", "makes", "seven", "naïve", "12", "€"),
    *("日本", "a\nb", "x = {}", '"quoted"', "<b>", "  ", "\n\n", "assistant", "it's", "\t"),
)
EDGES = ("", "", "", " ", "\n", "\n\n")
RARE_EDGES = (*("",) * 20, *EDGES)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    form = CHAT_FORMS[name]
    made = KINDS[name]([" ".join(WORDS), "user assistant system model", "three and four makes seven"] * 3)
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, special=True) for token in form.special]}
    )
    made.chat_template = form.jinja
    return made


def said(random: np.random.Generator, edges: bool = True) -> str:
    words = " ".join(random.choice(WORDS, random.integers(1, 8)))
    return f"{random.choice(EDGES)}{words}{random.choice(EDGES)}" if edges else f"a {words} b"


def random_conversation(
    seed: int, form: ChatForm
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    random = np.random.default_rng(seed)
    messages: list[dict[str, Any]] = []
    if form.system and random.random() < 0.4:
        messages.append({"role": "system", "content": said(random)})
    tools = None
    if form.tools and random.random() < 0.7:
        tools = [
            {"type": "function", "function": {"name": said(random, False), "parameters": {"ü": [1, None]}}}
        ]
    for _ in range(random.integers(1, 5)):
        messages.append({"role": "user", "content": said(random)})
        if tools and random.random() < 0.6:
            count = int(random.integers(1, 3))
            arguments = {"a": said(random), "b": {"c": [1.5, True]}}
            call = {"type": "function", "function": {"name": "add", "arguments": json.dumps(arguments)}}
            content = None if random.random() < 0.5 else said(random, False)
            messages.append({"role": "assistant", "content": content, "tool_calls": [call] * count})
            messages += [{"role": "tool", "content": said(random)} for _ in range(count)]
        messages.append({"role": "assistant", "content": f"{random.choice(RARE_EDGES)}so {said(random)}"})
    return messages, tools


def reference(
    tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]
) -> tuple[list[int], np.ndarray, list[str], bool]:
    """Ids, mask and roles of the pieces' text by the characters of each token; whether one crosses an edge of
    what is counted."""
    text = "".join(piece.text for piece in pieces)
    encoding = tokenizer(text, add_special_tokens=False).encodings[0]
    stops = np.cumsum([len(piece.text) for piece in pieces])
    first, last = np.asarray(encoding.offsets).T
    begin, end = (np.searchsorted(stops, at, side="right") for at in (first, np.maximum(first, last - 1)))
    counted = np.asarray([piece.counted for piece in pieces])
    roles = [pieces[at].role for at in begin]
    return encoding.ids, counted[begin], roles, bool((counted[begin] != counted[end]).any())


@pytest.mark.parametrize("name", CHAT_FORMS)
def test_ids_mask_and_roles_are_those_of_the_reference(name: str) -> None:
    form, tokenizer = CHAT_FORMS[name], tokenizer_of(name)
    bos = tokenizer.bos_token or ""
    given = [random_conversation(seed, form) for seed in range(CONVERSATIONS)]
    read = [conversation(messages, tools, SECTION) for messages, tools in given]
    renderer = ChatRenderer(tokenizer, with_roles=True)
    outcomes: Counter[str] = Counter()
    for each, found in zip(read, renderer.render(read), strict=True):
        assert isinstance(each, Conversation)
        ids, mask, roles, crosses = reference(tokenizer, form.pieces(bos, each.messages, each.tools or ()))
        if isinstance(found, str):
            assert (found, crosses) == (BOUNDARY, True)
            outcomes[found] += 1
            continue
        assert found.ids.tolist() == ids
        assert found.ids.tolist() == tokenizer.apply_chat_template(
            each.messages, tools=each.tools, return_dict=False
        )
        np.testing.assert_array_equal(found.loss_mask, mask)
        assert found.roles is not None
        begin = int(ids[0] == tokenizer.bos_token_id)
        assert [ROLES[role] for role in found.roles[begin:]] == roles[begin:]
        outcomes["exact"] += 1
    assert outcomes["exact"] > 0.7 * CONVERSATIONS, outcomes
    assert renderer.turn_ends == {tokenizer.convert_tokens_to_ids(form.end or tokenizer.eos_token)}


@pytest.mark.parametrize("name", CHAT_FORMS)
def test_what_added_tokens_show_is_what_tokenising_each_beginning_shows(name: str) -> None:
    form, tokenizer = CHAT_FORMS[name], tokenizer_of(name)
    read = [conversation(*random_conversation(seed, form), SECTION) for seed in range(300)]
    quick, slow = ChatRenderer(tokenizer), ChatRenderer(tokenizer)
    slow._splitting = {}
    for ours, theirs in zip(quick.render(read), slow.render(read), strict=True):
        if isinstance(ours, str) or isinstance(theirs, str):
            assert ours == theirs
            continue
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.loss_mask, theirs.loss_mask)
    assert quick.turn_ends == slow.turn_ends


@pytest.mark.parametrize("name", CHAT_FORMS)
def test_beginnings_are_rarely_tokenised_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, tokenizer = CHAT_FORMS[name], tokenizer_of(name)
    read = [conversation(*random_conversation(seed, form), SECTION) for seed in range(200)]
    renderer, again = ChatRenderer(tokenizer), 0
    whole = renderer._span

    def counted(*args: Any) -> Any:
        nonlocal again
        again += 1
        return whole(*args)

    monkeypatch.setattr(renderer, "_span", counted)
    turns = sum(isinstance(each, Rendered) for each in renderer.render(read))
    assert turns > 140
    assert again < 0.4 * len(read)


def test_the_last_turn_and_everything() -> None:
    tokenizer = tokenizer_of("chatml")
    messages = [{"role": role, "content": "it is so"} for role in ("user", "assistant") * 3]
    read = conversation(messages, None, SECTION)
    every, last, everything = (
        next(ChatRenderer(tokenizer, loss_on).render([read])) for loss_on in ("assistant", "last_turn", "all")
    )
    assert isinstance(every, Rendered) and isinstance(last, Rendered) and isinstance(everything, Rendered)
    turn = tokenizer("it is so<|im_end|>", add_special_tokens=False).input_ids
    assert every.ids[every.loss_mask].tolist() == turn * 3
    assert last.ids[last.loss_mask].tolist() == turn
    assert np.flatnonzero(last.loss_mask)[-1] == np.flatnonzero(every.loss_mask)[-1]
    assert everything.loss_mask.tolist() == [False] + [True] * (len(every.ids) - 1)


def test_earlier_turns_may_be_written_anew_where_only_the_last_counts() -> None:
    tokenizer = tokenizer_of("chatml")
    thought = "{{ 'hm, ' if m.role == 'assistant' and loop.last else '' }}{{ m.content }}"
    tokenizer.chat_template = CHAT_FORMS["chatml"].jinja.replace("{{ m.content }}", thought)
    messages = [{"role": role, "content": "it is so"} for role in ("user", "assistant") * 2]
    read = conversation(messages, None, SECTION)
    assert isinstance(next(ChatRenderer(tokenizer).render([read])), str)
    found = next(ChatRenderer(tokenizer, "last_turn").render([read]))
    assert isinstance(found, Rendered)
    assert tokenizer.decode(found.ids[found.loss_mask]) == "hm, it is so<|im_end|>"
