"""Conversations to token ids and loss mask, through the tokenizer's own chat template.

The template writes a conversation as one text. What it writes up to a turn, and up to its end, must be how
the whole text begins: then the characters of each of the assistant's turns are known, and its tokens with
them. A conversation for which that does not hold, because its template changes what was said before, is
dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from tptrain.data.render import BOUNDARY, EMPTY_COMPLETION, NOT_TEXT, Rendered
from tptrain.errors import Problem

ASSISTANT = "assistant"
NO_ANSWER = "no turn of the assistant"
REFUSED = "refused by the chat template"
REWRITTEN = "earlier turns written anew by the chat template"

Message = dict[str, str]


def chat_problems(tokenizer: PreTrainedTokenizerFast) -> list[Problem]:
    """What keeps a tokenizer from rendering conversations."""
    if tokenizer.chat_template:
        return []
    rule, other = "needs a tokenizer with a chat template", f"{tokenizer.name_or_path} has none"
    fix = "a tokenizer of an instruction-tuned model, or another preset"
    return [Problem("data.preset", "chat", rule, other, fix)]


def render_conversation(tokenizer: PreTrainedTokenizerFast, messages: object) -> Rendered | str:
    """Ids and mask of a conversation, or the reason to drop it.

    messages: a list of {"role", "content"}, both texts.
    The ids are those of `apply_chat_template(messages)`. Counted are the assistant's turns, each up to the
    token that ends it, which is the last special token that the template puts there: what it writes behind
    that, such as a new line, a server never generates.
    """
    checked = _checked(messages)
    if isinstance(checked, str):
        return checked
    try:
        text = _written(tokenizer, checked)
        turns = [_span(tokenizer, checked, at) for at, m in enumerate(checked) if m["role"] == ASSISTANT]
    except TemplateError:
        return REFUSED
    if not all(text.startswith(turn) for turn, _ in turns):
        return REWRITTEN
    encoding: Encoding = tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]
    mask = np.zeros(len(encoding), dtype=np.bool_)
    for turn, start in turns:
        counted = _tokens_between(tokenizer, encoding, start, len(turn))
        if counted is None:
            return BOUNDARY
        mask[counted.start : counted.stop] = True
    mask[:1] = False  # no token before it could predict it
    return Rendered(np.asarray(encoding.ids, dtype=np.int32), mask)


def question_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The ids of a conversation that begins with `question` and waits for the assistant."""
    text = _written(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _checked(messages: object) -> Sequence[Message] | str:
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        return NOT_TEXT
    parts = [each.get(name) for each in messages for name in ("role", "content")]
    if not all(isinstance(part, str) for part in parts):
        return NOT_TEXT
    answers = [each["content"] for each in messages if each["role"] == ASSISTANT]
    if not answers:
        return NO_ANSWER
    return messages if all(answer.strip() for answer in answers) else EMPTY_COMPLETION


def _written(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _span(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], at: int) -> tuple[str, int]:
    """The text up to the end of turn `at`, and where in it the turn begins.

    It begins behind what the template writes for a server that asks for this turn; if the text does not begin
    with that, the turn is given no place in it.
    """
    before = _written(tokenizer, messages[:at], add_generation_prompt=True)
    through = _written(tokenizer, messages[: at + 1])
    return (through, len(before)) if through.startswith(before) else ("\0", 0)


def _tokens_between(
    tokenizer: PreTrainedTokenizerFast, encoding: Encoding, start: int, stop: int
) -> range | None:
    """The tokens of the characters from `start` to `stop`, up to the last special one among them.

    None where a token has characters on both sides of `start`, or of the end.
    """
    offsets = encoding.offsets
    inside = [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]
    if not inside or offsets[inside[0]][0] < start:
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = [i for i in inside if encoding.ids[i] in special]
    last = ends[-1] if ends else inside[-1]
    return None if offsets[last][1] > stop else range(inside[0], last + 1)
