"""The one way from a record to what the model sees: token ids, loss mask and roles, or the reason why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from tptrain.config.schema import DataSection
from tptrain.data.chat import NO_QUESTION, REFUSED, ChatRenderer, chat_problems
from tptrain.data.pairs import encode_prompt, render_pairs
from tptrain.data.records import (
    ASSISTANT,
    PRESETS,
    USER,
    Conversation,
    Pair,
    Record,
    columns,
    conversation,
    is_chat,
    said,
)
from tptrain.data.rendered import Rendered
from tptrain.errors import raise_if_any

_CHUNK = 1024  # records given to the tokenizer at a time: enough to keep its threads busy
# A conversation has one; of this one only what comes before it is used.
_SOME_ANSWER = {"role": ASSISTANT, "content": "."}


@dataclass(frozen=True)
class Question:
    """What a server would be sent, and what it should answer.

    question: the last thing said, as the record has it. answer: as the record has it.
    prompt:   all that is sent, as the model sees it. ids: the same as tokens.
    """

    question: str
    prompt: str
    answer: str
    ids: list[int]


class Renderer:
    """Renders records as a recipe says, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, section: DataSection, with_roles: bool = False):
        """with_roles: say of each token whose text it is.

        Raises ProblemsError where the records are conversations and the tokenizer has no chat template.
        """
        self._tokenizer, self._section = tokenizer, section
        self._counts_all = section.loss_on == "all"
        # Pairs have a completion only; for conversations a plan refuses the word.
        loss_on = "assistant" if section.loss_on == "completion" else section.loss_on
        self._chat: ChatRenderer | None = None
        if is_chat(section):
            raise_if_any(chat_problems(tokenizer))
            self._chat = ChatRenderer(tokenizer, loss_on, with_roles)

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the tokens that ended what was counted so far, EOS first: a server must stop at them."""
        eos = self._tokenizer.eos_token_id
        ends = self._chat.turn_ends if self._chat else set()
        return [eos, *sorted(ends - {eos})]

    def __call__(self, records: Iterable[Record]) -> Iterator[Rendered | str]:
        """A `Rendered` or a reason for each record, in order."""
        remaining = iter(records)
        while chunk := list(islice(remaining, _CHUNK)):
            found = [said(record, self._section) for record in chunk]
            if self._chat is not None:
                yield from self._chat.render(each for each in found if not isinstance(each, Pair))
            else:
                yield from self._pairs(each for each in found if not isinstance(each, Conversation))

    def _pairs(self, found: Iterable[Pair | str]) -> Iterator[Rendered | str]:
        found = list(found)
        pairs = [each for each in found if isinstance(each, Pair)]
        prompts, completions = [each.prompt for each in pairs], [each.completion for each in pairs]
        rendered = iter(render_pairs(self._tokenizer, prompts, completions, self._counts_all))
        for each in found:
            yield each if isinstance(each, str) else next(rendered)

    def question(self, record: Record) -> Question | str:
        """A record as what a server would be sent, and the answer that it should give; or the reason why not.

        Of a conversation, what comes before the assistant's last turn.
        """
        found = said(record, self._section)
        if isinstance(found, str):
            return found
        if isinstance(found, Pair):
            asked, answer = columns(self._section)
            ids = encode_prompt(self._tokenizer, found.prompt)
            return Question(record[asked], found.prompt, record[answer], ids)
        last = max(at for at, message in enumerate(found.messages) if message["role"] == ASSISTANT)
        before, answer = found.messages[:last], found.messages[last]["content"]
        return self._asked(Conversation(before, found.tools), answer) if before else NO_QUESTION

    def question_ids(self, question: str) -> list[int]:
        """The ids of a question in the form of the records, which waits for its answer."""
        if self._chat is None:
            return encode_prompt(self._tokenizer, PRESETS[self._section.preset].prompt_of(question, {}))
        found = conversation([{"role": USER, "content": question}, _SOME_ANSWER], None, self._section)
        assert not isinstance(found, str), found
        return self._chat.asked(Conversation(found.messages[:-1]))[1]

    def _asked(self, found: Conversation, answer: str) -> Question | str:
        assert self._chat is not None
        try:
            text, ids = self._chat.asked(found)
        except TemplateError:
            return REFUSED
        return Question(found.messages[-1]["content"], text, answer, ids)


def texts_of(records: Iterable[Record], section: DataSection) -> Iterator[str]:
    """What the records say, for making a tokenizer: prompt and completion in one, or each message."""
    for record in records:
        found = said(record, section)
        if not isinstance(found, str):
            yield from found.texts()
