"""Conversations to token ids, loss mask and roles, through the tokenizer's own chat template.

The template writes a conversation as one text, which is tokenised as a whole. Where the assistant's turns
lie in it comes from the template: from its `{% generation %}` blocks if it has them, and otherwise from what
it writes for a server that asks for a turn, and up to the turn's end. Either text, tokenised by itself, must
give the first tokens of the whole. A conversation for which that does not hold is dropped, with the reason.

Those beginnings are rarely tokenised again. An added token of the tokenizer's, such as one that begins a
turn, is cut out of the text before anything else looks at it, so what lies before it and what lies behind it
are tokenised
apart from each other: of a beginning only what follows on its last added token, "assistant" and a new line,
say, has to be compared, and that is tokenised once for all conversations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tptrain.data.pairs import straddles
from tptrain.data.records import ASSISTANT, Conversation, Message
from tptrain.data.rendered import BOUNDARY, NO_ANSWER, Rendered, count_all, role_index
from tptrain.errors import Problem

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
    REWRITTEN: f"{_MARKS}, data.loss_on=last_turn, or conversations of one turn",
    UNENDED: "a chat template that ends the assistant's turn with a special token, in {% generation %} too",
}
FIX = "records with a list of role and content, of which the assistant's are non-empty texts"

# As transformers looks for it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant: characters `begin` to `stop` of the conversation's text.

    marked: the template says itself that all between the two counts.
    """

    begin: int
    stop: int
    marked: bool


@dataclass(frozen=True)
class _Written:
    """A conversation as one text, the turns that count, and the end of each message of which it is known;
    None where nobody asks for roles."""

    text: str
    turns: list[_Turn]
    ends: list[tuple[int, int]] | None  # (one behind the last character, role)


def chat_problems(tokenizer: PreTrainedTokenizerFast) -> list[Problem]:
    """What keeps a tokenizer from rendering conversations."""
    template = tokenizer.chat_template
    if template and (isinstance(template, str) or "default" in template):
        return []
    name = tokenizer.name_or_path or "train"
    rule, other = "needs a tokenizer with a chat template", f"the tokenizer {name!r} has none"
    fix = "prompt_completion, model.chat_template=chatml, or the tokenizer of an instruction-tuned model"
    return [Problem("data.preset", "chat", rule, other, fix)]


class ChatRenderer:
    """Renders conversations with one tokenizer.

    loss_on: assistant (every turn), last_turn (of the assistant) or all (tokens but the first).
    turn_ends: ids of the tokens that ended what was counted so far: a server must stop at them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, loss_on: str = "assistant", with_roles: bool = False
    ):
        """with_roles: say of each token whose text it is, for which every message is written once more."""
        assert loss_on in ("assistant", "last_turn", "all"), loss_on
        self._tokenizer, self._loss_on, self._with_roles = tokenizer, loss_on, with_roles
        self.turn_ends: set[int] = set()
        decoder = tokenizer.added_tokens_decoder
        # Once for all: of some tokenizers these are thousands.
        self._added = frozenset(decoder) | frozenset(tokenizer.all_special_ids)
        # Those that split a text whatever surrounds them; none where a token depends on the next character.
        splitting = (i for i, token in decoder.items() if not token.normalized)
        dependent = any(token.single_word for token in decoder.values())
        self._splitting = {i: decoder[i].content for i in (() if dependent else splitting)}
        self._tails: dict[tuple[str, str], list[int]] = {}

    def render(self, conversations: Iterable[Conversation | str]) -> Iterator[Rendered | str]:
        """Ids, mask and roles of each conversation, or the reason to drop it; reasons are passed through.

        All are tokenised in one call. The ids are those of `apply_chat_template(messages, tools=tools)`.
        Counted are the assistant's turns, each with the token that ends it. With `{% generation %}` in the
        template these are the tokens of its blocks, as in `return_assistant_tokens_mask`. Otherwise a turn's
        last token is the last special one that the template puts there: what it writes behind that, such as
        a new line, a server never generates.
        """
        written = [each if isinstance(each, str) else self._write(each) for each in conversations]
        encodings = iter(self._encode([each.text for each in written if isinstance(each, _Written)]))
        for each in written:
            yield each if isinstance(each, str) else self._rendered(each, next(encodings))

    def asked(self, conversation: Conversation) -> tuple[str, list[int]]:
        """Text and ids of a conversation that waits for the assistant."""
        text = self._text(conversation, conversation.messages, add_generation_prompt=True)
        return text, list(self._encode([text])[0].ids)

    def _text(
        self, conversation: Conversation, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(conversation.tools or ()) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        """As `apply_chat_template` tokenises: the template has written BOS where it belongs."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_token_type_ids=False,
            return_attention_mask=False,
            verbose=False,  # no warning about long texts, which are counted later
        )
        encodings: list[Encoding] = encoded.encodings
        return encodings

    def _write(self, conversation: Conversation) -> _Written | str:
        """The conversation's text and its turns, or the reason to drop it."""
        template = self._tokenizer.get_chat_template(tools=conversation.tools)
        ends: dict[int, int] = {}
        try:
            if _GENERATION.search(template):
                text, turns = self._marked_turns(conversation, template)
            else:
                text = self._text(conversation, conversation.messages)
                found = self._turns(conversation, text)
                if isinstance(found, str):
                    return found
                turns, ends = found
            if not turns:
                return NO_ANSWER
            counted = turns[-1:] if self._loss_on == "last_turn" else turns
            return _Written(text, counted, self._ends(conversation, text, ends) if self._with_roles else None)
        except TemplateError:
            return REFUSED

    def _turns(self, conversation: Conversation, text: str) -> tuple[list[_Turn], dict[int, int]] | str:
        """The assistant's turns that count, and the end of each one's message; or the reason to drop them."""
        messages = conversation.messages
        if messages[0]["role"] == ASSISTANT:
            return NO_QUESTION  # no template writes a conversation of no messages
        places = [at for at, message in enumerate(messages) if message["role"] == ASSISTANT]
        turns: list[_Turn] = []
        ends: dict[int, int] = {}
        for at in places[-1:] if self._loss_on == "last_turn" else places:
            before = self._text(conversation, messages[:at], add_generation_prompt=True)
            through = text if at + 1 == len(messages) else self._text(conversation, messages[: at + 1])
            if not through.startswith(before):
                return BEGUN_OTHERWISE
            if not text.startswith(through):
                return REWRITTEN
            turns.append(_Turn(len(before), len(through), marked=False))
            ends[at] = len(through)
        return turns, ends

    def _marked_turns(self, conversation: Conversation, template: str) -> tuple[str, list[_Turn]]:
        """The conversation's text and the template's `{% generation %}` blocks in it.

        Their characters, for the mask of `apply_chat_template` hides what is asked here: whether a token
        crosses the edge of a block. It also leaves all later blocks out behind one whose first character, a
        space, is not among its token's offsets.
        """
        special: dict[str, Any] = self._tokenizer.special_tokens_map
        # Its own annotation, a str, is not what it returns.
        found: Any = render_jinja_template(
            [list(conversation.messages)],
            tools=list(conversation.tools or ()) or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **special,
        )
        (text,), (blocks,) = found
        return text, [_Turn(start, stop, marked=True) for start, stop in blocks if start < stop]

    def _ends(self, conversation: Conversation, text: str, known: dict[int, int]) -> list[tuple[int, int]]:
        """Where each message ends, as far as its beginning of the conversation is one of the text."""
        messages, ends = conversation.messages, []
        for at, message in enumerate(messages):
            end = known.get(at)
            if end is None and at + 1 == len(messages):
                end = len(text)
            if end is None:
                try:
                    through = self._text(conversation, messages[: at + 1])
                except TemplateError:  # such as of a system's message alone
                    continue
                if not text.startswith(through):
                    continue
                end = len(through)
            ends.append((end, role_index(message["role"])))
        return ends

    def _rendered(self, written: _Written, whole: Encoding) -> Rendered | str:
        """Ids of the text, and the mask that counts the turns, if their edges are edges of tokens."""
        mask = np.zeros(len(whole), dtype=np.bool_)
        ids = np.asarray(whole.ids, dtype=np.int32)
        for turn in written.turns:
            span = self._span_by_splits(written.text, turn, whole, ids) or self._span(
                written.text, turn, whole
            )
            if isinstance(span, str):
                return span
            begin, stop, end = span
            mask[begin:stop] = True
            self.turn_ends.add(int(ids[end]))
        mask[:1] = False  # no token before it could predict it
        roles = None if written.ends is None else _roles(written.ends, whole)
        return Rendered(ids, count_all(mask) if self._loss_on == "all" else mask, roles)

    def _span_by_splits(
        self, text: str, turn: _Turn, whole: Encoding, ids: npt.NDArray[np.int32]
    ) -> tuple[int, int, int] | None:
        """As `_span`, where the added tokens of the whole show it; None where they do not."""
        begin = self._length_by_splits(text, turn.begin, whole, ids)
        last = len(text[turn.begin : turn.stop].rstrip()) + turn.begin - 1
        end = whole.char_to_token(last)
        if begin is None or end is None or end < begin or int(ids[end]) not in self._splitting:
            return None
        chars = whole.token_to_chars(end)
        if chars is None or chars[1] != last + 1:
            return None
        stop = self._length_by_splits(text, turn.stop, whole, ids) if turn.marked else end + 1
        return None if stop is None else (begin, stop, end)

    def _length_by_splits(
        self, text: str, end: int, whole: Encoding, ids: npt.NDArray[np.int32]
    ) -> int | None:
        """How many of the whole's tokens are those of `text[:end]` tokenised alone; None: unknown."""
        if end == len(text):
            return len(whole)
        token = whole.char_to_token(end)
        if token is None or _first_char(whole, token) != end:
            return None
        split = token - 1
        while split >= 0 and int(ids[split]) not in self._splitting:
            split -= 1
        chars = whole.token_to_chars(split) if split >= 0 else None
        if chars is None or chars[1] > end:
            return None
        name, tail = text[chars[0] : chars[1]], text[chars[1] : end]
        if name.strip() != self._splitting[int(ids[split])].strip():
            return None
        if tail and self._tail(name, tail) != ids[split:token].tolist():
            return None
        return token

    def _tail(self, name: str, tail: str) -> list[int]:
        """The ids of an added token and what follows it."""
        known = self._tails.get((name, tail))
        if known is None:
            if len(self._tails) >= 1024:  # tails with something of the conversation in them
                self._tails.clear()
            known = self._tails[name, tail] = list(self._encode([name + tail])[0].ids)
        return known

    def _span(self, text: str, turn: _Turn, whole: Encoding) -> tuple[int, int, int] | str:
        """The tokens of a turn: the first, one behind the last, and the one that ends it.

        Or the reason why they cannot be told.
        """
        before, through = self._encode([text[: turn.begin], text[: turn.stop]])
        begin = len(before)
        end = self._end(through, begin, text)
        if end is None:
            return UNENDED
        stop = len(through) if turn.marked else end + 1
        if whole.ids[:begin] != before.ids or whole.ids[:stop] != through.ids[:stop]:
            return BOUNDARY
        return BOUNDARY if straddles(whole, begin, turn.begin) else (begin, stop, end)

    def _end(self, through: Encoding, begin: int, text: str) -> int | None:
        """The token that ends the turn from `begin`: an added one with blanks behind it at most.

        Blanks themselves end no turn, though they may be added tokens, as Gemma's new lines are.
        """
        for at in range(len(through) - 1, begin - 1, -1):
            first, last = through.offsets[at]
            if text[first:last].strip():
                return at if through.ids[at] in self._added else None
        return None


def _first_char(whole: Encoding, token: int) -> int | None:
    chars = whole.token_to_chars(token)
    return None if chars is None else int(chars[0])


def _roles(ends: Sequence[tuple[int, int]], whole: Encoding) -> npt.NDArray[np.uint8]:
    """The role of each token, from the ends of the messages; behind the last known one, nobody's."""
    roles = np.zeros(len(whole), dtype=np.uint8)
    stops = np.searchsorted([first for first, _ in whole.offsets], [end for end, _ in ends])
    begin = 0
    for stop, (_, role) in zip(stops, ends, strict=True):
        roles[begin:stop] = role
        begin = stop
    return roles
