"""Greedy decoding against transformers' `generate`, shared by the backends' tests."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from tests import small
from tptrain.backends.base import Backend, Tensors
from tptrain.config import Plan
from tptrain.generate.decoding import Generator

PROMPT_TOKENS, NEW_TOKENS, GENERATED_ROWS = 12, 20, 6


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Eleven prompts of 1 to 12 tokens; with rows in sixes or eights, two batches, the last one not full."""
    lengths = [5, 12, 1, 9, 3, 7, 2, 12, 4, 11, 6]
    return tuple(
        tuple(np.random.default_rng(i).integers(0, small.VOCAB, n).tolist()) for i, n in enumerate(lengths)
    )


@cache
def reference_answers() -> tuple[tuple[int, ...], ...]:
    """transformers' greedy answers, one prompt at a time, without a stop token.

    Every choice is clear: the likeliest token leads by far more than the rounding of its logit.
    """
    model, answers = small.reference(), []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(made.logits).topk(2, dim=-1).values
        assert (best[..., 0] - best[..., 1]).min() > 1e-4 * best.abs().max()
        answers.append(tuple(made.sequences[0, len(prompt) :].tolist()))
    assert len({answer[-1] for answer in answers}) > 3, "answers that are all alike would hide mixed-up rows"
    return tuple(answers)


@cache
def stop_ids() -> tuple[int, ...]:
    """Two tokens that end some answers in the middle, at different places, and leave others whole."""
    answers = reference_answers()
    stops = (answers[0][7], answers[9][3])
    cut = cut_answers(stops)
    assert len(cut[0]) <= 7 and len(cut[9]) <= 3 and sum(len(a) == NEW_TOKENS for a in cut) >= 3
    return stops


def cut_answers(stops: tuple[int, ...]) -> list[list[int]]:
    """The reference answers up to the first stop token, which is not part of an answer."""
    cut = []
    for answer in reference_answers():
        ends = [i for i, token in enumerate(answer) if token in stops]
        cut.append(list(answer[: ends[0]] if ends else answer))
    return cut


def make_generator(backend: Backend, plan: Plan, stops: tuple[int, ...]) -> tuple[Generator, Tensors]:
    """A generator for these prompts, and the reference model's weights on its devices."""
    params = backend.place(small.DictSource(small.weights_of(small.reference())))
    return Generator(backend, plan, GENERATED_ROWS, PROMPT_TOKENS, NEW_TOKENS, stops), params
