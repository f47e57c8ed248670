"""Conversations to token ids and loss mask, through the tokenizer's own chat template.

The template writes a conversation as one text, which is tokenised as a whole. Where the assistant's turns
lie in it comes from the template: from its `{% generation %}` blocks if it has them, and otherwise from what
it writes for a server that asks for a turn, and up to the turn's end. Either text, tokenised by itself, must
give the first tokens of the whole. A conversation for which that does not hold is dropped, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tptrain.data.render import BOUNDARY, EMPTY_COMPLETION, NOT_TEXT, Rendered, straddles
from tptrain.errors import Problem

ASSISTANT = "assistant"
NO_ANSWER = "no turn of the assistant"
NO_QUESTION = "the assistant's turn comes first"
REFUSED = "refused by the chat template"
BEGUN_OTHERWISE = "a turn begun otherwise than the chat template asks for it"
REWRITTEN = "earlier turns written anew by the chat template"
UNENDED = "a turn without a token that ends it"

_MARKS = "a chat template with {% generation %} around the assistant's turns"
# What helps where most records are dropped for a reason.
FIXES = {
    BOUNDARY: "a chat template that begins the assistant's turn with what is a token by itself",
    NO_QUESTION: _MARKS,
    REFUSED: "conversations in the roles and the order that the chat template takes",
    BEGUN_OTHERWISE: _MARKS,
    REWRITTEN: f"{_MARKS}, or conversations of one turn",
    UNENDED: "a chat template that ends the assistant's turn with a special token, in {% generation %} too",
}
FIX = "records with a list of role and content, of which the assistant's are non-empty texts"

# As transformers looks for it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant, as two beginnings of the conversation's text: up to it, and through it.

    marked: the template says itself that all between the two counts.
    """

    before: str
    through: str
    marked: bool


def chat_problems(tokenizer: PreTrainedTokenizerFast) -> list[Problem]:
    """What keeps a tokenizer from rendering conversations."""
    template = tokenizer.chat_template
    if template and (isinstance(template, str) or "default" in template):
        return []
    name = tokenizer.name_or_path or "train"
    rule, other = "needs a tokenizer with a chat template", f"the tokenizer {name!r} has none"
    fix = "prompt_completion, or model.tokenizer=FOLDER of an instruction-tuned model"
    return [Problem("data.preset", "chat", rule, other, fix)]


def render_conversation(tokenizer: PreTrainedTokenizerFast, messages: object) -> Rendered | str:
    """Ids and mask of one conversation, or the reason to drop it. See `render_conversations`."""
    return next(render_conversations(tokenizer, [messages]))


def render_conversations(
    tokenizer: PreTrainedTokenizerFast, conversations: Iterable[object]
) -> Iterator[Rendered | str]:
    """Ids and mask of each conversation, or the reason to drop it.

    A conversation is a list of {"role", "content"}, both texts.
    The ids are those of `apply_chat_template(messages)`. Counted are the assistant's turns, each with the
    token that ends it. With `{% generation %}` in the template these are the tokens of its blocks, as in
    `return_assistant_tokens_mask`. Otherwise a turn's last token is the last special one that the template
    puts there: what it writes behind that, such as a new line, a server never generates.
    """
    # Once for all: of some tokenizers these are thousands.
    added = frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)
    for messages in conversations:
        checked = _checked(messages)
        if isinstance(checked, str):
            yield checked
            continue
        try:
            text = _written(tokenizer, checked)
            turns = _turns(tokenizer, checked, text)
        except TemplateError:
            yield REFUSED
            continue
        yield turns if isinstance(turns, str) else _masked(tokenizer, text, turns, added)


def question_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The ids of a conversation that begins with `question` and waits for the assistant."""
    text = _written(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
    return list(_encodings(tokenizer, [text])[0].ids)


def _checked(messages: object) -> list[Message] | str:
    """The messages without what is None in them, as `apply_chat_template` takes them, or why not."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        return NOT_TEXT
    given = [{name: part for name, part in each.items() if part is not None} for each in messages]
    parts = [each.get(name) for each in given for name in ("role", "content")]
    if not all(isinstance(part, str) for part in parts):
        return NOT_TEXT
    answers = [each["content"] for each in given if each["role"] == ASSISTANT]
    if not answers:
        return NO_ANSWER
    return given if all(answer.strip() for answer in answers) else EMPTY_COMPLETION


def _written(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _turns(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], text: str) -> list[_Turn] | str:
    """The assistant's turns of a conversation written as `text`, or the reason to drop it."""
    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        return _marked_turns(tokenizer, messages, text, template)
    if messages[0]["role"] == ASSISTANT:
        return NO_QUESTION  # no template writes a conversation of no messages
    turns = []
    for at in (at for at, message in enumerate(messages) if message["role"] == ASSISTANT):
        turn = _Turn(
            before=_written(tokenizer, messages[:at], add_generation_prompt=True),
            through=_written(tokenizer, messages[: at + 1]),
            marked=False,
        )
        if not turn.through.startswith(turn.before):
            return BEGUN_OTHERWISE
        if not text.startswith(turn.through):
            return REWRITTEN
        turns.append(turn)
    return turns


def _marked_turns(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], text: str, template: str
) -> list[_Turn] | str:
    """The template's `{% generation %}` blocks.

    Their characters, for the mask of `apply_chat_template` hides what is asked here: whether a token crosses
    the edge of a block. It also leaves all later blocks out behind one whose first character, a space, is not
    among its token's offsets.
    """
    special: dict[str, Any] = tokenizer.special_tokens_map
    # Its own annotation, a str, is not what it returns.
    found: Any = render_jinja_template(
        [list(messages)], chat_template=template, return_assistant_tokens_mask=True, **special
    )
    written, blocks = found
    assert written == [text], "one conversation, one text"
    turns = [_Turn(text[:start], text[:stop], marked=True) for start, stop in blocks[0] if start < stop]
    return turns or NO_ANSWER


def _masked(
    tokenizer: PreTrainedTokenizerFast, text: str, turns: Sequence[_Turn], added: frozenset[int]
) -> Rendered | str:
    """Ids of the text, and the mask that counts the turns, if their edges are edges of tokens."""
    befores, throughs = [turn.before for turn in turns], [turn.through for turn in turns]
    whole, *parts = _encodings(tokenizer, [text, *befores, *throughs])
    mask = np.zeros(len(whole), dtype=np.bool_)
    for turn, before, through in zip(turns, parts[: len(turns)], parts[len(turns) :], strict=True):
        begin = len(before)
        stop = _stop(through, begin, turn.through, added)
        if stop is None:
            return UNENDED
        if turn.marked:
            stop = len(through)
        if whole.ids[:begin] != before.ids or whole.ids[:stop] != through.ids[:stop]:
            return BOUNDARY
        if straddles(whole, begin, len(turn.before)):
            return BOUNDARY
        mask[begin:stop] = True
    mask[:1] = False  # no token before it could predict it
    return Rendered(np.asarray(whole.ids, dtype=np.int32), mask)


def _stop(through: Encoding, begin: int, text: str, added: frozenset[int]) -> int | None:
    """One behind the token that ends the turn from `begin`: an added one with blanks behind it at most.

    Blanks themselves end no turn, though they may be added tokens, as Gemma's new lines are.
    """
    for at in range(len(through) - 1, begin - 1, -1):
        first, last = through.offsets[at]
        if text[first:last].strip():
            return at + 1 if through.ids[at] in added else None
    return None


def _encodings(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Encoding]:
    """As `apply_chat_template` tokenises: the template has written BOS where it belongs."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    encodings: list[Encoding] = encoded.encodings
    return encodings
