"""Rows of several sources: exact epochs, exact shares, and the same rows in whatever batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tptrain.config.schema import DataSection, ScheduleSection, SourceSection
from tptrain.data.batches import Batch, Batches
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.mixture import Mixture
from tptrain.data.order import mixed_at, whole_shares
from tptrain.data.rendered import Rendered

PAD, SEQ_LEN = 99_999, 9
SIZES = {"code": 7, "math": 23, "web": 41}
FIRST = {"code": 1000, "math": 2000, "web": 3000}  # first id of a source's first record


def records_of(name: str, count: int) -> TokenizedDataset:
    """Record i begins with FIRST + 10 i and has 2 to 6 tokens."""
    rows = []
    for index in range(count):
        ids = FIRST[name] + 10 * index + np.arange(2 + (index + len(name)) % 5, dtype=np.int32)
        rows.append(Rendered(ids, np.arange(len(ids)) >= 1))
    return TokenizedDataset.of(rows, PAD)


ROWS = {name: records_of(name, count) for name, count in SIZES.items()}


def section(mix: str = "concat", **settings: object) -> DataSection:
    weights = {"code": 2.0, "math": 0.5, "web": 1.3}
    sources = {name: SourceSection(weight=weight) for name, weight in weights.items()}
    given = {"seq_len": SEQ_LEN, "batch_rows": 4, "seed": 5, "mix": mix, "sources": sources}
    return DataSection(**{**given, **settings})  # type: ignore[arg-type]


def source_of(token: int) -> str:
    return next(name for name, first in FIRST.items() if first <= token < first + 1000)


def records_in(batch: Batch) -> list[int]:
    """First id of every record, row by row."""
    starts = (batch.positions == 0) & (batch.segment_ids > 0)
    return [int(token) for token in batch.tokens[starts]]


def drawn(mixture: Mixture, cursors: range) -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for cursor in cursors:
        source, records = mixture.sample(cursor)
        found.append((mixture.names[source], tuple(int(record) for record in records)))
    return found


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_an_epoch_of_concat_is_every_record_once(packing: str) -> None:
    mixture = Mixture(ROWS, section(packing=packing))
    everything = {(name, record) for name, size in SIZES.items() for record in range(size)}
    epochs = []
    for epoch in range(3):
        rows = drawn(mixture, range(epoch * mixture.num_samples, (epoch + 1) * mixture.num_samples))
        records = [(name, record) for name, row in rows for record in row]
        assert len(records) == len(everything) and set(records) == everything
        epochs.append(rows)
    assert len({tuple(rows) for rows in epochs}) == 3, "another order each time"
    assert len({name for name, _ in epochs[0][:12]}) > 1, "shuffled together"


@pytest.mark.parametrize("mix", ["concat", "weights", "temperature"])
def test_rows_hold_records_of_one_source(mix: str) -> None:
    batches = Batches(ROWS, section(mix, packing="best_fit", batch_rows=60), 1, None)
    batch = batches.batch_at(31)
    assert batch.segment_ids.max() > 1, "rows are shared"
    for tokens, segments in zip(batch.tokens[0], batch.segment_ids[0], strict=True):
        assert len({source_of(int(token)) for token in tokens[segments > 0]}) == 1


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_shares_of_rows_are_the_weights(packing: str) -> None:
    mixture = Mixture(ROWS, section("weights", packing=packing))
    count = Counter(mixture.names[mixture.sample(cursor)[0]] for cursor in range(10_000))
    for name, weight in {"code": 2.0, "math": 0.5, "web": 1.3}.items():
        assert count[name] / 10_000 == pytest.approx(weight / 3.8, rel=0.01)
        assert mixture.row_shares()[name] == pytest.approx(count[name] / 10_000, abs=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 1e6])
def test_temperature_flattens_the_shares_of_tokens(temperature: float) -> None:
    mixture = Mixture(ROWS, section("temperature", mix_temperature=temperature))
    powers = {name: len(rows.ids) ** (1 / temperature) for name, rows in ROWS.items()}
    for name, share in mixture.row_shares().items():
        assert share == pytest.approx(powers[name] / sum(powers.values()), rel=0.01)


@pytest.mark.parametrize(
    "weights",
    [(1.0, 1.999), (0.3, 0.7), (0.07, 0.29, 0.64), (5.0, 1 / 3, 1.1, 2.0), (1.0, 1.0), (1e-3, 900.0)],
)
def test_shares_are_within_half_a_percent_of_any_weights(weights: tuple[float, ...]) -> None:
    shares = whole_shares(weights)
    for share, weight in zip(shares, weights, strict=True):
        assert share / sum(shares) == pytest.approx(weight / sum(weights), rel=0.01)
    count = Counter(mixed_at(cursor, shares).source for cursor in range(sum(shares) % 20_011))
    total = sum(count.values())
    for source, share in enumerate(shares):
        assert abs(count[source] - total * share / sum(shares)) <= len(shares), "spread evenly"


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_by_weight_each_source_goes_through_its_own_epochs(packing: str) -> None:
    """All records of a source once before one comes again, in another order each time."""
    rows = drawn(Mixture(ROWS, section("weights", packing=packing)), range(600))
    for name, size in SIZES.items():
        records = [record for source, row in rows if source == name for record in row]
        passes = [records[at : at + size] for at in range(0, len(records) - size, size)]
        assert len(passes) > 1
        assert all(sorted(one) == list(range(size)) for one in passes)
        # Seven records in rows that are cut alike may come in one order twice.
        assert len({tuple(one) for one in passes}) > len(passes) / 2


def test_sources_of_the_same_records_are_shuffled_apart() -> None:
    same = {"code": ROWS["web"], "web": ROWS["web"]}
    rows = drawn(Mixture(same, section("weights")), range(80))
    orders = [[row for name, row in rows if name == source] for source in same]
    assert orders[0][:20] != orders[1][:20]


@pytest.mark.parametrize("mix", ["concat", "weights", "temperature"])
@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_another_batch_size_goes_on_with_the_next_row(mix: str, packing: str) -> None:
    def batches(rows: int) -> Batches:
        return Batches(ROWS, section(mix, packing=packing, batch_rows=rows), 1, None)

    straight = [records_in(batches(1).batch_at(cursor)) for cursor in range(200)]
    first = [records_in(batches(6).batch_at(cursor)) for cursor in range(0, 60, 6)]
    rest = [records_in(batches(10).batch_at(cursor)) for cursor in range(60, 200, 10)]
    assert [r for step in [*first, *rest] for r in step] == [r for step in straight for r in step]


@pytest.mark.parametrize("mix", ["concat", "weights", "temperature"])
def test_far_cursors_need_no_walk_there(mix: str) -> None:
    mixture = Mixture(ROWS, section(mix))
    assert drawn(mixture, range(10**12, 10**12 + 50)) == drawn(
        Mixture(ROWS, section(mix)), range(10**12, 10**12 + 50)
    )


def test_tokens_of_sources_equal_a_recount() -> None:
    batches = Batches(ROWS, section("weights", packing="best_fit", batch_rows=10), 2, None)
    for cursor in range(0, 100, 10):
        batch = batches.batch_at(cursor)
        counted = Counter(source_of(int(token)) for token in batch.tokens[batch.segment_ids > 0])
        assert batch.source_tokens == {name: counted[name] for name in SIZES}
        assert sum(batch.source_tokens.values()) == batch.real_tokens


def test_empty_rows_at_the_end_of_epochs_are_of_no_source() -> None:
    batches = Batches.of_run(ROWS, section(batch_rows=30), 1, ScheduleSection(epochs=1))
    steps = [batches.batch_at(cursor) for cursor in (0, 30, 60)]
    total = Counter[str]()
    for batch in steps:
        total.update(batch.source_tokens)
    assert total == {name: len(rows.ids) for name, rows in ROWS.items()}
    assert steps[-1].padded_tokens > 19 * SEQ_LEN


@pytest.mark.parametrize("mix", ["concat", "weights", "temperature"])
@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_one_source_is_a_run_without_names_bit_for_bit(mix: str, packing: str) -> None:
    plain = Batches(ROWS["web"], DataSection(seq_len=SEQ_LEN, batch_rows=8, seed=5, packing=packing), 2, None)
    named = Batches({"web": ROWS["web"]}, section(mix, packing=packing, batch_rows=8), 2, None)
    assert named.digest() == plain.digest()
    for cursor in (0, 8, 40, 1000):
        one, other = plain.batch_at(cursor), named.batch_at(cursor)
        for array in ("tokens", "targets", "weights", "positions", "segment_ids"):
            np.testing.assert_array_equal(getattr(one, array), getattr(other, array))
        assert one.rows_digest == other.rows_digest
        assert one.source_tokens == other.source_tokens == {}


def test_the_digest_sees_sources_names_and_weights() -> None:
    data = section("weights")
    heavier = replace(data, sources={**data.sources, "web": SourceSection(weight=1.4)})
    fewer = {**ROWS, "web": records_of("web", 40)}
    renamed = {"code": ROWS["code"], "math": ROWS["math"], "zed": ROWS["web"]}
    named_zed = replace(data, sources={**data.sources, "zed": SourceSection(weight=1.3)})
    made = [
        Mixture(ROWS, data),
        Mixture(ROWS, heavier),
        Mixture(fewer, data),
        Mixture(renamed, named_zed),
        Mixture(ROWS, section("concat")),
        Mixture(ROWS, section("weights", packing="best_fit")),
    ]
    assert len({mixture.digest() for mixture in made}) == len(made)
    assert Mixture(ROWS, section("weights")).digest() == made[0].digest()


# Written down once. A change here changes what every run that is to be resumed sees next.
GOLDEN = {
    "concat": [
        *(("web", 33), ("web", 22), ("math", 18), ("web", 21), ("web", 29), ("web", 27)),
        *(("web", 40), ("math", 14), ("web", 18), ("math", 15), ("web", 3), ("web", 0)),
    ],
    "weights": [
        *(("code", 6), ("code", 5), ("math", 16), ("code", 0), ("web", 23), ("code", 1)),
        *(("web", 29), ("code", 3), ("math", 1), ("code", 2), ("web", 5), ("code", 4)),
    ],
}


@pytest.mark.parametrize("mix", GOLDEN)
def test_order_is_the_one_written_down(mix: str) -> None:
    rows = drawn(Mixture(ROWS, section(mix)), range(12))
    assert [(name, *row) for name, row in rows] == GOLDEN[mix]
