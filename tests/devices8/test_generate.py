"""Greedy answers on eight devices equal those of transformers' `generate`, from programs compiled once."""

from __future__ import annotations

import torch

from tests import greedy, small
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)


def test_answers_equal_transformers_and_later_batches_compile_nothing() -> None:
    """Uneven prompts in two batches, some answers cut by a stop token and some not."""
    plan = small.small_plan(4, 2)
    backend = XlaBackend(plan, PERMUTED)
    generator, params = greedy.make_generator(backend, plan, greedy.stop_ids())
    assert generator.rows == 8, "six rows, rounded up to what fsdp=4 divides"
    expected = greedy.cut_answers(greedy.stop_ids())
    before = backend.compile_count()
    first = generator.generate(params, greedy.prompts()[:8])
    compiled = backend.compile_count()
    assert first == expected[:8]
    assert compiled == before + 2, "one program reads prompts, one appends a token"
    rest = generator.generate(params, greedy.prompts()[8:])
    again = generator.generate(params, greedy.prompts())
    assert rest == expected[8:] and again == expected
    assert backend.compile_count() == compiled
    weights = small.whole_rows(backend, plan, params)
    for name, theirs in small.weights_of(small.reference()).items():
        assert (weights[name][: theirs.shape[0]] == theirs).all(), "generating leaves the weights alone"


def test_runs_of_layers_have_caches_of_their_own() -> None:
    """With the last layer trained alone, its weights in float32 above two layers in bfloat16."""
    trainable = ("model.layers.2.*", "model.norm.weight")
    plan, plain = small.small_plan(4, 2, trainable=trainable), small.torch_plan(trainable=trainable)
    backend = XlaBackend(plan, PERMUTED)
    shapes = {n: tuple(t.shape)[:1] for n, t in backend.make_caches(8, 16, torch.float32).items()}
    assert shapes == {"key.0": (2,), "value.0": (2,), "key.1": (1,), "value.1": (1,)}
    ours, params = greedy.make_generator(backend, plan, ())
    theirs, same = greedy.make_generator(TorchBackend(plain), plain, ())
    assert ours.generate(params, greedy.prompts()[:5]) == theirs.generate(same, greedy.prompts()[:5])
