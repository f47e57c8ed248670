"""Word problems in the form of GSM8K, made by a fixed procedure: the quickstart's data, with no download.

    question  Ann has 48 coins. Ben gives Ann 24 more. How many coins does Ann have now?
    answer    48+24: 8+4=12, 4+2+1=7 -> 72
              #### 72

One or two steps of +, -, times 2 or 3, and halving, with every number below 100. The working goes digit by
digit, as on paper, so that a model of half a million parameters can learn the method in minutes.

What is held out: a pair of numbers is either for training or held out, whichever operation joins them and in
whichever order. A training record joins training pairs only, at every step; a held-out record joins held-out
pairs only. A right answer to a held-out problem is therefore worked out, not remembered.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

T = TypeVar("T")
Record = dict[str, str]
Operation = Literal["+", "-", "*", "/"]

TRAINING_RECORDS = 20_000
HELD_OUT_RECORDS = 500

_HELD_OUT_SHARE = 5  # one pair in so many
_TWO_STEP_SHARE = 3  # one problem in so many
_SMALLEST = 11  # of both numbers of + and -, and of the one that is multiplied or halved
_LARGEST = 99
# With larger factors some product of digits would occur in one pair of numbers only: held out, that pair
# would ask for a fact that training never shows.
_FACTORS = (2, 3)
_DIVISORS = (2,)

_NAMES = (
    *("Ann", "Ben", "Carla", "Dan", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack"),
    *("Kate", "Leo", "Maya", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Will"),
)
_THINGS = (
    *("apples", "balls", "beads", "books", "cakes", "cards", "clips", "coins", "cups", "eggs"),
    *("flowers", "hats", "keys", "marbles", "nuts", "pens", "plums", "shells", "stamps", "toys"),
)
_PLACES = {
    "bag": "bags",
    "basket": "baskets",
    "box": "boxes",
    "drawer": "drawers",
    "jar": "jars",
    "shelf": "shelves",
}

# {a} and {b} are the numbers of the first step; the second step joins {c} to its result.
_TEMPLATES: dict[tuple[Operation, ...], tuple[str, ...]] = {
    ("+",): (
        "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
        "{name} found {a} {things} on Monday and {b} on Friday. How many {things} did {name} find?",
        "One {place} holds {a} {things} and another holds {b} {things}. How many {things} are there in all?",
        "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
        "{name} made {a} {things}. {other} made {b} more than {name}. How many {things} did {other} make?",
        "After selling {b} {things}, {name} has {a} left. How many {things} did {name} have before?",
    ),
    ("-",): (
        "{name} has {a} {things}. {name} gives {b} of them to {other}. How many {things} are left?",
        "There were {a} {things} in a {place}. {name} took {b} of them. How many {things} are still there?",
        "{name} needs {a} {things} and has {b} {things}. How many more {things} does {name} need?",
        "{name} had {a} {things} and lost {b} of them. How many {things} are left?",
        "{name} made {a} {things}. {other} made {b} fewer than {name}. How many {things} did {other} make?",
        "{other} has {b} {things}. {name} has {a} {things}. How many more {things} does {name} have?",
    ),
    ("*",): (
        "{name} fills {b} {places} with {a} {things} each. How many {things} is that?",
        "Each {place} holds {a} {things}. How many {things} do {b} {places} hold?",
        "{name} makes {a} {things} every day. How many {things} does {name} make in {b} days?",
        "{other} has {a} {things}. {name} has {b} times as many. How many {things} does {name} have?",
    ),
    ("/",): (
        "{name} puts {a} {things} into {b} {places}, the same number in each. How many {things} are in each?",
        "{b} friends share {a} {things} equally. How many {things} does each friend get?",
        "{name} made {a} {things} in {b} days, the same number every day. How many {things} is that a day?",
    ),
    ("+", "-"): (
        "{name} has {a} {things}, finds {b} more {things} and then loses {c}. How many {things} are left?",
        "{name} made {a} {things} and {other} made {b}. They sold {c} of them. How many {things} are left?",
    ),
    ("-", "+"): (
        "{name} had {a} {things}, gave {b} of them to {other} and found {c} more. "
        "How many {things} does {name} have now?",
    ),
    ("+", "*"): (
        "{name} makes {a} {things} and {other} makes {b} {things} every day. "
        "How many {things} do they make in {c} days?",
    ),
    ("*", "+"): (
        "{name} fills {b} {places} with {a} {things} each. {c} more {things} are left. "
        "How many {things} is that in all?",
    ),
    ("*", "-"): (
        "{name} buys {b} {places} with {a} {things} each and loses {c} of the {things}. "
        "How many {things} are left?",
    ),
    ("/", "+"): (
        "{name} and {other} share {a} {things} in {b} equal parts. {name} had {c} {things} before. "
        "How many {things} does {name} have now?",
    ),
}  # fmt: skip
_ONE_STEP = tuple(operations for operations in _TEMPLATES if len(operations) == 1)
_TWO_STEPS = tuple(operations for operations in _TEMPLATES if len(operations) == 2)


@dataclass(frozen=True)
class Step:
    """One operation on two numbers."""

    operation: Operation
    left: int
    right: int

    @property
    def result(self) -> int:
        if self.operation == "+":
            return self.left + self.right
        if self.operation == "-":
            return self.left - self.right
        return self.left * self.right if self.operation == "*" else self.left // self.right

    @property
    def pair(self) -> tuple[int, int]:
        """The two numbers without their order: the unit that is for training or held out."""
        return min(self.left, self.right), max(self.left, self.right)


def is_held_out(pair: tuple[int, int]) -> bool:
    """Whether a pair of numbers is kept for held-out problems, by a hash of the pair alone."""
    low, high = min(pair), max(pair)
    return zlib.crc32(f"pair {low} {high}".encode()) % _HELD_OUT_SHARE == 0


def training_records(count: int, seed: int) -> list[Record]:
    """`count` problems on training pairs: dicts of question and answer, a pure function of (count, seed)."""
    return [record for record, _ in problems(count, seed, held_out=False)]


def held_out_records(count: int, seed: int) -> list[Record]:
    """`count` problems on number pairs that no training record joins."""
    return [record for record, _ in problems(count, seed, held_out=True)]


def problems(count: int, seed: int, held_out: bool) -> list[tuple[Record, tuple[Step, ...]]]:
    """Problems with the steps that solve them, one part of the pairs only."""
    rng = Random(f"{'held out' if held_out else 'training'} {seed}")
    return [_problem(rng, held_out) for _ in range(count)]


def _problem(rng: Random, held_out: bool) -> tuple[Record, tuple[Step, ...]]:
    operations = _pick(rng, _TWO_STEPS if _below(rng, _TWO_STEP_SHARE) == 0 else _ONE_STEP)
    template = _pick(rng, _TEMPLATES[operations])
    steps = _steps(rng, operations, held_out)
    name = _pick(rng, _NAMES)
    place = _pick(rng, tuple(_PLACES))
    question = template.format(
        a=steps[0].left,
        b=steps[0].right,
        c=steps[-1].right,
        name=name,
        other=_pick(rng, tuple(choice for choice in _NAMES if choice != name)),
        things=_pick(rng, _THINGS),
        place=place,
        places=_PLACES[place],
    )
    return {"question": question, "answer": _answer(steps)}, steps


def _answer(steps: tuple[Step, ...]) -> str:
    return "\n".join([*(working(step) for step in steps), f"#### {steps[-1].result}"])


def _steps(rng: Random, operations: tuple[Operation, ...], held_out: bool) -> tuple[Step, ...]:
    """Numbers for the operations: drawn until every pair lies in the part wanted and is modest."""
    while True:
        left = _SMALLEST + _below(rng, _LARGEST - _SMALLEST + 1)
        steps: list[Step] = []
        for operation in operations:
            step = Step(operation, left, _right_number(rng, operation, left))
            if not _fits(step) or is_held_out(step.pair) != held_out:
                break
            steps.append(step)
            left = step.result
        if len(steps) == len(operations):
            return tuple(steps)


def _right_number(rng: Random, operation: Operation, left: int) -> int:
    if operation == "*":
        return _pick(rng, _FACTORS)
    if operation == "/":
        return _pick(rng, _DIVISORS)
    top = _LARGEST - left if operation == "+" else left - 1
    return _SMALLEST + _below(rng, max(1, top - _SMALLEST + 1))


def _fits(step: Step) -> bool:
    """Whether the numbers of a step are modest: two digits on the left, a result of one or two digits."""
    if step.left < _SMALLEST or not 0 < step.result <= _LARGEST:
        return False
    return step.operation != "/" or (step.left % step.right == 0 and step.result >= 10)


def working(step: Step) -> str:
    """The line that works a step out digit by digit.

    48+24: 8+4=12, 4+2+1=7 -> 72      ones, then tens with the carry
    52-27: 12-7=5, 5-2-1=2 -> 25      ones, with a ten lent if need be, then tens
    27*3: 7*3=21, 2*3+2=8 -> 81       ones, then tens with the carry
    56/2: 5/2=2 r1, 16/2=8 -> 28      tens and their rest, then ones
    """
    head = f"{step.left}{step.operation}{step.right}"
    tens, ones = divmod(step.left, 10)
    first, second = _DIGIT_WORK[step.operation](tens, ones, step.right)
    return f"{head}: {first}, {second} -> {step.result}"


def _add(tens: int, ones: int, right: int) -> tuple[str, str]:
    other_tens, other_ones = divmod(right, 10)
    carry, _ = divmod(ones + other_ones, 10)
    more = "+1" if carry else ""
    return (
        f"{ones}+{other_ones}={ones + other_ones}",
        f"{tens}+{other_tens}{more}={tens + other_tens + carry}",
    )


def _subtract(tens: int, ones: int, right: int) -> tuple[str, str]:
    other_tens, other_ones = divmod(right, 10)
    lent = int(ones < other_ones)
    ones += 10 * lent
    less = "-1" if lent else ""
    return f"{ones}-{other_ones}={ones - other_ones}", f"{tens}-{other_tens}{less}={tens - other_tens - lent}"


def _multiply(tens: int, ones: int, right: int) -> tuple[str, str]:
    carry, _ = divmod(ones * right, 10)
    more = f"+{carry}" if carry else ""
    return f"{ones}*{right}={ones * right}", f"{tens}*{right}{more}={tens * right + carry}"


def _divide(tens: int, ones: int, right: int) -> tuple[str, str]:
    quotient, rest = divmod(tens, right)
    remainder = f" r{rest}" if rest else ""
    ones += 10 * rest
    return f"{tens}/{right}={quotient}{remainder}", f"{ones}/{right}={ones // right}"


_DIGIT_WORK: dict[Operation, Callable[[int, int, int], tuple[str, str]]] = {
    "+": _add,
    "-": _subtract,
    "*": _multiply,
    "/": _divide,
}


def _below(rng: Random, count: int) -> int:
    # Python promises the same numbers for a seed from random() only, not from randrange() or choice().
    return int(rng.random() * count)


def _pick(rng: Random, choices: tuple[T, ...]) -> T:
    return choices[_below(rng, len(choices))]
