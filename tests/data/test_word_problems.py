"""The embedded word problems: right, in GSM8K's form, and honestly held out."""

from __future__ import annotations

import re

import pytest

from tptrain.data.answers import exact_match, extract_answer
from tptrain.data.word_problems import (
    HELD_OUT_RECORDS,
    TRAINING_RECORDS,
    Step,
    held_out_records,
    is_held_out,
    problems,
    training_records,
    working,
)

NUMBER = re.compile(r"\d+")


@pytest.fixture(scope="module")
def training() -> list[tuple[dict[str, str], tuple[Step, ...]]]:
    return problems(TRAINING_RECORDS, 0, held_out=False)


@pytest.fixture(scope="module")
def held_out() -> list[tuple[dict[str, str], tuple[Step, ...]]]:
    return problems(HELD_OUT_RECORDS, 0, held_out=True)


def test_no_pair_of_numbers_is_both_trained_and_held_out(training: list, held_out: list) -> None:
    trained = {step.pair for _, steps in training for step in steps}
    kept = {step.pair for _, steps in held_out for step in steps}
    assert len(trained) > 1000
    assert len(kept) > 100
    assert not trained & kept
    assert not any(is_held_out(pair) for pair in trained)
    assert all(is_held_out(pair) for pair in kept)


def test_parts_do_not_depend_on_seed_operation_or_order() -> None:
    trained = {
        step.pair for seed in range(1, 4) for _, steps in problems(2000, seed, False) for step in steps
    }
    kept = {step.pair for seed in range(1, 4) for _, steps in problems(300, seed, True) for step in steps}
    assert not trained & kept
    assert is_held_out((27, 48)) == is_held_out((48, 27))


def test_pairs_of_the_questions_themselves_are_apart(training: list, held_out: list) -> None:
    """Without the steps' help: the two numbers that a one-step question shows."""

    def shown(record: dict[str, str]) -> frozenset[str]:
        return frozenset(NUMBER.findall(record["question"]))

    trained = {shown(record) for record, steps in training if len(steps) == 1}
    assert not trained & {shown(record) for record, steps in held_out if len(steps) == 1}


def test_every_digit_fact_of_a_held_out_problem_is_trained(training: list, held_out: list) -> None:
    """A held-out problem asks to put known single-digit facts together, never for a fact unheard of."""

    def facts(rows: list) -> set[str]:
        return {
            equation
            for record, _ in rows
            for line in record["answer"].splitlines()[:-1]
            for equation in line.partition(": ")[2].partition(" -> ")[0].split(", ")
        }

    more_held_out = problems(1500, 5, held_out=True)
    assert len(facts(training)) > 200
    assert not facts(held_out) - facts(training)
    assert not facts(more_held_out) - facts(training)


def test_answers_are_right(training: list, held_out: list) -> None:
    for record, steps in [*training[:3000], *held_out]:
        *workings, final = record["answer"].splitlines()
        assert len(workings) == len(steps)
        for line, step in zip(workings, steps, strict=True):
            expression, equations, result = re.fullmatch(r"(\S+): (.+) -> (\d+)", line).groups()
            assert int(eval(expression)) == eval(expression) == int(result) == step.result
            for equation in equations.split(", "):
                left, right = re.sub(r" r\d$", "", equation).split("=")
                assert int(eval(left)) == int(right)
        assert final == f"#### {steps[-1].result}"
        assert extract_answer(record["answer"]) == str(steps[-1].result)


def test_question_shows_every_number_and_all_are_modest(training: list) -> None:
    for record, steps in training[:3000]:
        shown = sorted(map(int, NUMBER.findall(record["question"])))
        used = [steps[0].left, *(step.right for step in steps)]
        assert shown == sorted(used)
        assert all(0 < number < 100 for number in [*used, *(step.result for step in steps)])


def test_each_question_is_nearly_always_new(training: list) -> None:
    questions = {record["question"] for record, _ in training}
    assert len(questions) > 0.95 * len(training)


def test_operations_and_steps_are_mixed(held_out: list) -> None:
    shares = {
        operation: sum(step.operation == operation for _, steps in held_out for step in steps) / len(held_out)
        for operation in "+-*/"
    }
    assert all(share > 0.1 for share in shares.values()), shares
    assert 0.25 < sum(len(steps) == 2 for _, steps in held_out) / len(held_out) < 0.42


def test_pure_function_of_count_and_seed() -> None:
    assert training_records(50, 7) == training_records(50, 7)
    assert training_records(50, 7) == training_records(80, 7)[:50]
    assert training_records(50, 7) != training_records(50, 8)
    assert held_out_records(50, 7) != training_records(50, 7)


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (Step("+", 48, 24), "48+24: 8+4=12, 4+2+1=7 -> 72"),
        (Step("+", 50, 16), "50+16: 0+6=6, 5+1=6 -> 66"),
        (Step("-", 52, 27), "52-27: 12-7=5, 5-2-1=2 -> 25"),
        (Step("-", 38, 35), "38-35: 8-5=3, 3-3=0 -> 3"),
        (Step("*", 27, 3), "27*3: 7*3=21, 2*3+2=8 -> 81"),
        (Step("*", 42, 2), "42*2: 2*2=4, 4*2=8 -> 84"),
        (Step("/", 56, 2), "56/2: 5/2=2 r1, 16/2=8 -> 28"),
        (Step("/", 84, 2), "84/2: 8/2=4, 4/2=2 -> 42"),
    ],
)
def test_working(step: Step, line: str) -> None:
    assert working(step) == line


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48+24 = <<48+24=72>>72\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("#### 0.5 dollars", "0.5"),
        ("#### 72\n#### 73", "72"),
        ("72", None),
        ("####72", None),
        ("#### many", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_exact_match() -> None:
    assert exact_match("so\n#### 1,000", "#### 1000")
    assert not exact_match("72", "#### 72")
    assert not exact_match("#### 7", "#### 72")
    assert exact_match(" Paris\n", "Paris")
    assert not exact_match("", "#### 72")


def test_gsm8k_references_have_answers(gsm8k: object) -> None:
    from tptrain.data.sources import load_records

    records = load_records(f"{gsm8k}/test.jsonl", None, "test", None)
    assert len(records) == 1319
    assert all(exact_match(record["answer"], record["answer"]) for record in records)
    assert extract_answer(records[0]["answer"]) == "18"
    assert sum(extract_answer(record["answer"]) is None for record in records) == 0
