"""The order of samples: a permutation per epoch, another one each time, the same for ever."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import tptrain.data
from tptrain.data.order import sample_at

# Written down once. A change here changes what every run that is to be resumed sees next.
GOLDEN = {
    (10, 0): [1, 2, 4, 5, 9, 7, 8, 6, 0, 3, 9, 6, 1, 8, 2, 0, 3, 5, 4, 7],
    (10, 1): [6, 5, 7, 3, 8, 4, 9, 2, 0, 1, 2, 8, 9, 3, 5, 0, 1, 6, 7, 4],
}


def epoch(number: int, num_records: int, seed: int) -> list[int]:
    start = number * num_records
    return [sample_at(cursor, num_records, seed) for cursor in range(start, start + num_records)]


@pytest.mark.parametrize("num_records", [1, 2, 3, 7, 64, 1009, 7473])
def test_every_epoch_is_a_permutation(num_records: int) -> None:
    for number in range(3):
        assert sorted(epoch(number, num_records, 11)) == list(range(num_records))


def test_epochs_and_seeds_differ_and_are_shuffled() -> None:
    orders = [epoch(number, 101, seed) for number in range(4) for seed in range(4)]
    assert len({tuple(order) for order in orders}) == len(orders)
    for order in orders:
        in_place = sum(index == record for index, record in enumerate(order))
        in_sequence = sum(after == before + 1 for before, after in pairwise(order))
        assert in_place < 10
        assert in_sequence < 10


def test_second_epoch_is_not_the_first_of_the_next_seed() -> None:
    assert epoch(1, 101, 0) != epoch(0, 101, 1)


@pytest.mark.parametrize(("num_records", "seed"), GOLDEN)
def test_order_is_the_one_written_down(num_records: int, seed: int) -> None:
    golden = GOLDEN[num_records, seed]
    assert [sample_at(cursor, num_records, seed) for cursor in range(len(golden))] == golden


def test_far_cursor_needs_no_walk_there() -> None:
    far = 5_000_000_000_000
    assert 0 <= sample_at(far, 7473, 0) < 7473
    assert len({sample_at(far + step, 1_000_003, 0) for step in range(200)}) == 200


def test_large_seed_is_taken() -> None:
    assert epoch(0, 11, 2**40) != epoch(0, 11, 2**40 + 1)


def test_importing_the_package_starts_no_framework() -> None:
    names = [path.stem for path in Path(tptrain.data.__file__).parent.glob("[a-z]*.py")]
    imports = "; ".join(f"import tptrain.data.{name}" for name in names)
    check = f"{imports}; import sys; print([m for m in ('jax', 'torch', 'grain') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", found.stdout


def test_grain_is_imported_without_its_remark() -> None:
    check = "from tptrain.data.order import sample_at; sample_at(0, 3, 0)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "profiling" not in found.stderr
