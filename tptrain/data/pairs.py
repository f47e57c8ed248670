"""A prompt and what continues it to token ids and loss mask, together and exactly, or the reason why not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from tptrain.data.rendered import BOUNDARY, Rendered, count_all, role_index

_PROMPT, _COMPLETION = role_index("user"), role_index("assistant")


def render_pairs(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    completions: Sequence[str],
    count_prompts: bool = False,
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

    count_prompts: count them as well.
    """
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    whole = _encode(tokenizer, texts)
    alone = _encode(tokenizer, prompts)
    return [
        _attribute(tokenizer, encoding, prompt_ids(tokenizer, before), len(prompt), count_prompts)
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
    tokenizer: PreTrainedTokenizerFast,
    encoding: Encoding,
    prefix: list[int],
    boundary: int,
    count_prompt: bool,
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
    roles = np.full(len(ids), _COMPLETION, dtype=np.uint8)
    roles[:begin] = _PROMPT
    roles[: encoding.special_tokens_mask[0] if ids else 0] = 0  # BOS is nobody's
    return Rendered(np.asarray(ids, dtype=np.int32), count_all(mask) if count_prompt else mask, roles)


def straddles(encoding: Encoding, begin: int, boundary: int) -> bool:
    """Whether the last token of the prompt ends, or the first of the completion starts, across the boundary.

    Characters only grow from token to token, so these two decide for all. Special tokens have no characters.
    """
    before = encoding.token_to_chars(begin - 1) if begin > 0 else None
    after = encoding.token_to_chars(begin) if begin < len(encoding) else None
    return (before is not None and before[1] > boundary) or (after is not None and after[0] < boundary)
