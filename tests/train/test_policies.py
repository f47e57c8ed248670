"""When a step is saved and which ones stay: the policies, and what a recipe makes of them."""

import random
from dataclasses import replace

import pytest

from tptrain.ckpt.policies import (
    AnyOf,
    EverySeconds,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    SavedStep,
    steps_to_delete,
)
from tptrain.config import EvalSection, SaveSection, ScheduleSection
from tptrain.config.kept_steps import most_kept
from tptrain.config.planning import plan_recipe
from tptrain.train.saving import keep_policies, save_policy

SAVED = [
    SavedStep(100, {"exact_match": 0.4, "loss": 1.0}),
    SavedStep(200, {"exact_match": 0.7, "loss": 0.8}),
    SavedStep(250),
    SavedStep(300, {"exact_match": 0.7, "loss": 0.9}),
    SavedStep(400, {"exact_match": 0.5, "loss": 0.5}),
    SavedStep(450, {"loss": 0.7}),
]


def due_steps(policy, seconds=0.0):
    return [step for step in range(1, 13) if policy.due(step, seconds)]


def test_every_steps():
    assert due_steps(EverySteps(5)) == [5, 10]
    assert due_steps(EverySteps(1)) == list(range(1, 13))


def test_every_seconds():
    assert not EverySeconds(60).due(7, 59.9)
    assert EverySeconds(60).due(7, 60.0)


def test_any_of():
    both = AnyOf((EverySteps(5), EverySeconds(60)))
    assert due_steps(both) == [5, 10]
    assert due_steps(both, 61.0) == list(range(1, 13))
    assert due_steps(AnyOf(()), 1e9) == []


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (KeepLast(1), {450}),
        (KeepLast(2), {400, 450}),
        (KeepLast(99), {100, 200, 250, 300, 400, 450}),
        (KeepEvery(100), {100, 200, 300, 400}),
        (KeepEvery(250), {250}),
        (KeepBest(1, "exact_match"), {300}),  # of equal ones the newer
        (KeepBest(2, "exact_match"), {200, 300}),
        (KeepBest(3, "exact_match"), {200, 300, 400}),
        (KeepBest(2, "loss", higher_is_better=False), {400, 450}),
        (KeepBest(2, "accuracy"), set()),
    ],
)
def test_kept(policy, kept):
    shuffled = random.Random(3).sample(SAVED, len(SAVED))
    assert policy.kept(SAVED) == policy.kept(shuffled) == kept


def test_deleted_is_what_no_policy_keeps():
    assert steps_to_delete(SAVED, [KeepLast(1), KeepBest(1, "exact_match")]) == [100, 200, 250, 400]
    assert steps_to_delete(SAVED, [KeepLast(2), KeepEvery(100)]) == [250]


def test_the_newest_is_never_deleted():
    assert steps_to_delete(SAVED, []) == [100, 200, 250, 300, 400]
    assert steps_to_delete(SAVED, [KeepBest(1, "exact_match")]) == [100, 200, 250, 400]
    assert steps_to_delete([], [KeepLast(1)]) == []


@pytest.fixture
def plan(recipe):
    def make(max_steps=4, problems=0, scores=0, **save):
        sections = {"save": SaveSection(**save), "schedule": ScheduleSection(max_steps=max_steps)}
        if problems:
            sections["eval"] = EvalSection(
                problems=problems, path="e.jsonl", every_steps=scores, max_new_tokens=9
            )
        return plan_recipe(recipe(**sections))

    return make


def test_what_a_recipe_saves(plan):
    assert save_policy(plan(every_steps=2)) == AnyOf((EverySteps(2),))
    assert save_policy(plan(every_steps=2, every_seconds=90)) == AnyOf((EverySteps(2), EverySeconds(90)))
    assert save_policy(plan(every_steps=0)) == AnyOf(())


def test_what_a_recipe_keeps(plan):
    assert keep_policies(plan(keep_last=3)) == [KeepLast(3)]
    both = plan(problems=5, scores=2, every_steps=2, keep_every=4, keep_best=1)
    assert keep_policies(both) == [KeepLast(2), KeepEvery(4), KeepBest(1, "exact_match")]


@pytest.mark.parametrize(
    ("max_steps", "save", "count"),
    [
        (100, {"every_steps": 10, "keep_last": 2}, 2),
        (100, {"every_steps": 10, "keep_last": 99}, 10),  # no more are ever saved
        (105, {"every_steps": 10, "keep_last": 99}, 11),  # the last one, too
        (100, {"every_steps": 10, "keep_last": 2, "keep_every": 50}, 4),
        (100, {"every_steps": 10, "keep_last": 2, "keep_every": 15}, 5),  # 30, 60, 90
        (100, {"every_steps": 0, "keep_last": 5}, 1),
        (100, {"every_steps": 10, "every_seconds": 60, "keep_last": 99}, 99),
    ],
)
def test_most_kept(plan, max_steps, save, count):
    assert most_kept(plan(max_steps, **save)) == count


def test_most_kept_where_the_length_is_not_known(plan, recipe):
    by_epochs = ScheduleSection(epochs=2)
    made = plan_recipe(recipe(schedule=by_epochs, save=SaveSection(keep_last=3, keep_every=10)))
    assert most_kept(made) == 3
    best = plan(problems=5, scores=2, max_steps=100, every_steps=2, keep_best=3)
    assert most_kept(best) == 5
    assert most_kept(replace(best, recipe=replace(best.recipe, schedule=by_epochs))) == 5
