"""Greedy answers on the torch backend equal those of transformers' `generate`, token by token."""

from __future__ import annotations

from typing import Any

import pytest

from tests import greedy, small
from tptrain.backends.torch_backend import TorchBackend
from tptrain.errors import ProblemsError
from tptrain.generate.decoding import Generator


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return TorchBackend(small.torch_plan())


def test_answers_without_stop_tokens(backend: TorchBackend) -> None:
    generator, params = greedy.make_generator(backend, backend.plan, ())
    assert generator.generate(params, greedy.prompts()) == greedy.cut_answers(())


def test_stop_tokens_cut_answers(backend: TorchBackend) -> None:
    generator, params = greedy.make_generator(backend, backend.plan, greedy.stop_ids())
    assert generator.generate(params, greedy.prompts()) == greedy.cut_answers(greedy.stop_ids())


def test_a_batch_whose_answers_have_all_ended_ends(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token stops: no more than the steps between two looks are run."""
    steps = []
    original = Generator._append
    monkeypatch.setattr(Generator, "_append", lambda self, *given: steps.append(1) or original(self, *given))
    monkeypatch.setattr("tptrain.generate.decoding._STEPS_BETWEEN_LOOKS", 4)
    generator, params = greedy.make_generator(backend, backend.plan, tuple(range(small.VOCAB)))
    assert generator.generate(params, greedy.prompts()[:3]) == [[], [], []]
    assert len(steps) == 3


@pytest.mark.parametrize(("prompt", "new"), [(500, 20), (512, 1)])
def test_what_does_not_fit_the_positions_is_refused(backend: TorchBackend, prompt: int, new: int) -> None:
    with pytest.raises(ProblemsError) as error:
        Generator(backend, backend.plan, 1, prompt, new, ())
    (problem,) = error.value.problems
    text: Any = str(problem)
    assert problem.setting == "max_new_tokens" and problem.value == new
    assert "max_position_embeddings=512" in text and str(512 - prompt) in problem.fix
