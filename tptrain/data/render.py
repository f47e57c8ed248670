"""One record to token ids and loss mask, together and exactly, or to the reason why it cannot be done.

A preset turns a record into two texts, prompt and completion, and `render_many` is the one place where their
ids and mask are made. Conversations have `tptrain.data.chat` instead: whatever makes a `Rendered` can be
batched and packed, for nothing later looks at texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from tptrain.config.schema import DataSection
from tptrain.errors import Problem, nearest

# Reasons why a record is dropped; these are the keys of the counts and the words that are printed.
BOUNDARY = "prompt and completion share a token"
MISSING_COLUMN = "column missing"
NOT_TEXT = "not text"
EMPTY_COMPLETION = "empty completion"


@dataclass(frozen=True)
class Preset:
    """How a record becomes a prompt and a completion: default columns, and a template for each text.

    input_column: of a second text of the prompt, which records may lack or leave empty; None for no such.
    with_input:   the template of a prompt that has one.
    """

    prompt_column: str
    completion_column: str
    prompt: str
    completion: str
    input_column: str | None = None
    with_input: str = ""

    def input_of(self, record: Mapping[str, Any]) -> object:
        """The second text of the prompt as the record has it; "" for none."""
        more = record.get(self.input_column) if self.input_column else None
        return "" if more is None else more

    def prompt_of(self, text: str, record: Mapping[str, Any]) -> str:
        more = self.input_of(record)
        assert isinstance(more, str), "such records are dropped"
        return self.with_input.format(text, more) if more.strip() else self.prompt.format(text)


PRESETS = {
    "prompt_completion": Preset("prompt", "completion", "{}", "{}"),
    "gsm8k": Preset("question", "answer", "Question: {}\nAnswer:", " {}"),
    "alpaca": Preset(
        *("instruction", "output"),
        "### Instruction:\n{}\n\n### Response:\n",
        "{}",
        input_column="input",
        with_input="### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n",
    ),
}
# The preset whose records are conversations: see `tptrain.data.chat`.
CHAT, MESSAGES = "chat", "messages"


@dataclass(frozen=True)
class Rendered:
    """A record as the model sees it.

    ids:       int32 [T], the tokenizer's encoding of the whole text, EOS at the end.
    loss_mask: bool [T], True where the token counts in the loss: the completion's tokens and EOS.
    """

    ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]


def render(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> Rendered | str:
    """Ids and mask of one prompt and completion, or the reason to drop them. See `render_many`."""
    return render_many(tokenizer, [prompt], [completion])[0]


def render_many(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], completions: Sequence[str]
) -> list[Rendered | str]:
    """Ids and mask of each prompt and completion, or the reason (`BOUNDARY`) why the mask cannot be exact.

    Prompt and completion are encoded as one text, by the tokenizer's own rules (BOS or not), and EOS is
    appended unless the tokenizer did it. With a token per word and space, and BOS in front:

        prompt "Question: 1+1?\\nAnswer:"   completion " 2"
        ids    BOS Question : _ 1 + 1 ? \\n Answer :    _ 2 EOS
        mask    0     0     0 0 0 0 0 0  0    0   0    1 1  1

    The first ids must be those of the prompt encoded alone, which is what a server sends, and no token may
    have characters on both sides of the boundary. Anything else would teach the model to continue a prompt
    that it is never given.
    """
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    whole = _encode(tokenizer, texts)
    alone = _encode(tokenizer, prompts)
    return [
        _attribute(tokenizer, encoding, prompt_ids(tokenizer, before), len(prompt))
        for encoding, before, prompt in zip(whole, alone, prompts, strict=True)
    ]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The ids of a prompt that the model is to continue: what generation starts from."""
    return prompt_ids(tokenizer, _encode(tokenizer, [prompt])[0])


def prompt_ids(tokenizer: PreTrainedTokenizerFast, encoding: Encoding) -> list[int]:
    """The ids of an encoded prompt, without an EOS that the tokenizer appends: a prompt is not the end."""
    ids: list[int] = encoding.ids
    appended = bool(ids) and ids[-1] == tokenizer.eos_token_id and encoding.special_tokens_mask[-1] == 1
    return ids[:-1] if appended else ids


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Encoding]:
    """Encodings, with the characters of each token."""
    if not texts:  # which transformers does not take
        return []
    # verbose=False: no warning about long texts, which are counted later.
    encoded = tokenizer(list(texts), return_token_type_ids=False, return_attention_mask=False, verbose=False)
    encodings: list[Encoding] = encoded.encodings
    return encodings


def _attribute(
    tokenizer: PreTrainedTokenizerFast, encoding: Encoding, prefix: list[int], boundary: int
) -> Rendered | str:
    """Ids and mask of an encoded text whose completion begins at character `boundary`."""
    ids: list[int] = encoding.ids
    begin = len(prefix)
    if ids[:begin] != prefix or straddles(encoding, begin, boundary):
        return BOUNDARY
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    # The first token of a row has no token before it that could predict it.
    mask = np.arange(len(ids)) >= max(begin, 1)
    return Rendered(np.asarray(ids, dtype=np.int32), mask)


def straddles(encoding: Encoding, begin: int, boundary: int) -> bool:
    """Whether the last token of the prompt ends, or the first of the completion starts, across the boundary.

    Characters only grow from token to token, so these two decide for all. Special tokens have no characters.
    """
    before = encoding.token_to_chars(begin - 1) if begin > 0 else None
    after = encoding.token_to_chars(begin) if begin < len(encoding) else None
    return (before is not None and before[1] > boundary) or (after is not None and after[0] < boundary)


def columns(section: DataSection) -> tuple[str, ...]:
    """The names of the prompt's and the completion's column; of conversations there is one."""
    if section.preset == CHAT:
        return (MESSAGES if section.prompt_column == "auto" else section.prompt_column,)
    preset = PRESETS[section.preset]
    prompt, completion = section.prompt_column, section.completion_column
    return (
        preset.prompt_column if prompt == "auto" else prompt,
        preset.completion_column if completion == "auto" else completion,
    )


def check_columns(records: Iterable[Mapping[str, Any]], section: DataSection) -> list[Problem]:
    """A problem for each column that no record has. A record that alone lacks one is dropped and counted."""
    found = sorted({name for record in records for name in record})
    problems = []
    for setting, name in zip(("prompt_column", "completion_column"), columns(section), strict=False):
        if name in found:
            continue
        guess = nearest(name, found)
        fix = f"{guess!r} (did you mean it?)" if guess else _passing_column(found, setting)
        other = f"columns: {', '.join(found)}"
        problems.append(Problem(f"data.{setting}", name, "must be a column of the records", other, fix))
    return problems


def _passing_column(found: Sequence[str], setting: str) -> str:
    if MESSAGES in found:
        return f"data.preset={CHAT}"
    for name, preset in PRESETS.items():
        if preset.prompt_column in found and preset.completion_column in found:
            return f"data.preset={name}"
    return f"data.{setting}=one of these"


def prompt_text(record: Mapping[str, Any], section: DataSection) -> str:
    """The prompt of a record, as trained on and as generation and a server must send it."""
    return PRESETS[section.preset].prompt_of(record[columns(section)[0]], record)


def all_texts(records: Iterable[Mapping[str, Any]], section: DataSection) -> list[str]:
    """What the records say, for making a tokenizer: prompt and completion in one, or each message."""
    if section.preset == CHAT:
        (column,) = columns(section)
        messages = (each for record in records for each in record.get(column) or ())
        return [each["content"] for each in messages if isinstance(each.get("content"), str)]
    texts = (record_texts(record, section) for record in records)
    return ["".join(text) for text in texts if not isinstance(text, str)]


def record_texts(record: Mapping[str, Any], section: DataSection) -> tuple[str, str] | str:
    """Prompt and completion of a record, or the reason to drop it."""
    prompt_column, completion_column = columns(section)
    if prompt_column not in record or completion_column not in record:
        return MISSING_COLUMN
    preset, completion = PRESETS[section.preset], record[completion_column]
    if not all(
        isinstance(each, str) for each in (record[prompt_column], completion, preset.input_of(record))
    ):
        return NOT_TEXT
    if not completion.strip():
        return EMPTY_COMPLETION
    return prompt_text(record, section), preset.completion.format(completion)
