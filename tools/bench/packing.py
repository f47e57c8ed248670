"""How densely and how fast records are packed into rows, beside TRL's best-fit decreasing.

    make bench-data                                       builds TRL's environment and runs all benchmarks of
    data python tools/bench/packing.py [--gsm8k FOLDER] [--pairs 3]

Every set is packed by tptrain (A) and by TRL (B), as A B A B ... on the same cores; TRL runs in a process of
its own that is started once. TRL is given the sequences 1,000 at a time, as it packs by default, and once all
at a time, where it packs most densely and takes longest. What is timed is what happens before training: of A
the plan of an epoch and its draw, of B `pack_dataset`, which copies the tokens as well; A copies them while
training runs, row by row, and `rows_sequences_per_second` says how fast. The last line is a JSON object, by
set:

density                        tokens over the places of all rows
density_minus_trl              that, less TRL's best
sequences_per_second, sequences_per_second_over_trl
                               medians over the pairs; TRL's is that of its default, the faster one
rows_sequences_per_second      records put into the arrays of batches, by one thread
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.trl_child import PYTHON, Trl
from tptrain.config.schema import DataSection
from tptrain.data.batches import Batches
from tptrain.data.dataset import TokenizedDataset, offsets_of
from tptrain.data.packing import PackedRows
from tptrain.data.sources import load_records
from tptrain.data.tokenizer import train_tokenizer

Lengths = npt.NDArray[np.int64]
TRL_BATCH = 1000  # the default of datasets' map, which TRL leaves


def lognormal(count: int, middle: float, spread: float, longest: int) -> Callable[[], Lengths]:
    def draw() -> Lengths:
        drawn = np.random.default_rng(count).lognormal(np.log(middle), spread, count)
        return np.clip(drawn, 8, longest).astype(np.int64)

    return draw


def uniform(count: int, shortest: int, longest: int) -> Callable[[], Lengths]:
    return lambda: np.random.default_rng(count).integers(shortest, longest + 1, count)


def gsm8k(folder: str) -> Lengths:
    """Tokens of GSM8K's training problems under a byte-level BPE made from them."""
    records = load_records(f"{folder}/train.jsonl", None, "train", None)
    texts = [f"Question: {record['question']}\nAnswer: {record['answer']}" for record in records]
    tokenizer = train_tokenizer(texts, 16_000)
    return np.asarray([len(ids) + 1 for ids in tokenizer(texts).input_ids])


# Name -> (lengths, seq_len).
SETS: dict[str, tuple[Callable[[], Lengths], int]] = {
    "chats_100k_of_2048": (lognormal(100_000, 250, 0.9, 2048), 2048),
    "short_100k_of_4096": (lognormal(100_000, 60, 0.6, 4096), 4096),
    "long_20k_of_8192": (uniform(20_000, 1024, 8192), 8192),
    "halves_50k_of_1024": (uniform(50_000, 300, 700), 1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", default=os.environ.get("TPTRAIN_GSM8K"), help="folder of its train.jsonl")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--trl", type=Path, default=PYTHON, help="Python of TRL's environment")
    options = parser.parse_args()
    sets = dict(SETS)
    if options.gsm8k:
        sets = {f"gsm8k_of_{n}": (lambda: gsm8k(options.gsm8k), n) for n in (512, 2048)} | sets
    with Trl(options.trl) as trl, tempfile.TemporaryDirectory() as folder:
        found = {
            name: beside_trl(name, np.minimum(draw(), seq_len), seq_len, trl, Path(folder), options.pairs)
            for name, (draw, seq_len) in sets.items()
        }
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}")
    print(json.dumps(found))


def beside_trl(
    name: str, lengths: Lengths, seq_len: int, trl: Trl, folder: Path, pairs: int
) -> dict[str, float]:
    path = folder / f"{name}.npy"
    np.save(path, lengths)
    ours, theirs, rows, default_rows = [], [], 0, 0.0
    for _ in range(pairs):
        started = time.perf_counter()
        packed = PackedRows(lengths, seq_len, seed=0)
        packed.records(0, 0)
        ours.append(time.perf_counter() - started)
        rows = len(packed)
        answer = trl.ask(do="pack", lengths=str(path), seq_len=seq_len, batch=TRL_BATCH)
        theirs.append(answer["seconds"])
        default_rows = answer["rows"]
    whole = trl.ask(do="pack", lengths=str(path), seq_len=seq_len, batch=len(lengths))
    tokens, best = int(lengths.sum()), min(whole["rows"], default_rows)
    found = {
        "density": tokens / (rows * seq_len),
        "density_minus_trl": tokens / (rows * seq_len) - tokens / (best * seq_len),
        "sequences_per_second": len(lengths) / median(ours),
        "sequences_per_second_over_trl": median(b / a for a, b in zip(ours, theirs, strict=True)),
        "rows_sequences_per_second": rows_speed(lengths, seq_len),
    }
    least = -(-tokens // seq_len)
    print(
        f"{name}: {len(lengths):,} sequences, {tokens:,} tokens, {least:,} rows at least; rows: {rows:,}, "
        f"TRL {default_rows:,.0f} by 1,000 and {whole['rows']:,.0f} at once; sequences/s: "
        f"{found['sequences_per_second']:,.0f}, {found['sequences_per_second_over_trl']:.1f} x TRL's "
        f"(TRL at once: {len(lengths) / whole['seconds']:,.0f})",
        flush=True,
    )
    return {name: round(value, 6) for name, value in found.items()}


def rows_speed(lengths: Lengths, seq_len: int) -> float:
    """Records put into batches of 16 rows in a second."""
    ids = np.zeros(lengths.sum(), dtype=np.int32)
    dataset = TokenizedDataset(ids, ids == 0, offsets_of(lengths.tolist()), 0)
    batches = Batches(dataset, DataSection(seq_len=seq_len, batch_rows=16, packing="best_fit"), 1, None)
    batches.batch_at(0)
    count, started = 0, time.perf_counter()
    for cursor in range(0, min(40 * 16, batches.num_samples), 16):
        batch = batches.batch_at(cursor)
        count += int(((batch.positions == 0) & (batch.segment_ids > 0)).sum())  # at each record's first token
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
