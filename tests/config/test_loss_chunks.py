"""The tokens of a row whose logits are computed at a time: as asked for, or chosen by their bytes."""

from __future__ import annotations

import pytest
from samples import SMALL_LLAMA, small_recipe

from tptrain.config import DataSection, LossSection, MeshSection, ModelSection, Plan
from tptrain.config.loss_chunks import LOGITS_BYTES, chunk_tokens
from tptrain.config.planning import plan_recipe
from tptrain.report.plan_page import plan_json, plan_page

WIDE_VOCAB = {**SMALL_LLAMA, "vocab_size": 128253, "max_position_embeddings": 8192}


def plan(seq_len: int, rows: int, chunk: int = 0, tensor: int = 1) -> Plan:
    """On 8 devices; a vocabulary like Llama 3's, which tensor=2 pads to 128,254."""
    return plan_recipe(
        small_recipe(
            model=ModelSection(config=dict(WIDE_VOCAB), tokenizer="train"),
            data=DataSection(path="train.jsonl", seq_len=seq_len, batch_rows=rows),
            mesh=MeshSection(tensor=tensor),
            loss=LossSection(chunk_tokens=chunk),
        ),
        environ={},
    )


@pytest.mark.parametrize(
    ("seq_len", "rows", "tensor", "expected"),
    [
        # Tokens of all rows of a device in a chunk: about 4,185 in 2 GiB, twice that with V split in 2.
        (2048, 8, 1, 2048),  # 1 row, 2,048 tokens: all there are
        (2048, 16, 1, 2048),  # 2 rows, 4,096
        (8192, 16, 1, 2048),  # 2 rows, 4,096
        (8192, 8, 2, 4096),  # 2 rows, 8,192
        (4099, 16, 1, 4099),  # a prime number of tokens: chunks of one token would be far off
    ],
)
def test_the_plan_chooses_the_divisor_nearest_to_the_bytes(
    seq_len: int, rows: int, tensor: int, expected: int
) -> None:
    made = plan(seq_len, rows, tensor=tensor)
    assert made.loss_chunk_tokens == expected
    assert seq_len % expected == 0
    assert made.logits_token_bytes == 4 * made.device_rows * -(-128253 // tensor)


def test_a_row_without_divisors_is_told_of() -> None:
    (notice,) = (each for each in plan(4099, 24).notices if "logits" in each)  # 3 rows: 1,395 tokens in 2 GiB
    assert (
        notice.startswith("The logits of 4099 tokens of a row take 5.9 GiB on each device")
        and "is 1." in notice
    )
    for fine in (plan(4096, 24), plan(4099, 24, chunk=4099)):
        assert not [each for each in fine.notices if "logits" in each]


def test_what_is_asked_for_is_what_runs() -> None:
    made = plan(8192, 16, chunk=128)
    assert made.loss_chunk_tokens == plan_json(made)["loss_chunk_tokens"] == 128


@pytest.mark.parametrize("seq_len", [1, 2, 96, 510, 1031, 8192])
@pytest.mark.parametrize("token_bytes", [1, 10**6, 10**12])
def test_chunks_divide_the_row_and_none_is_nearer(seq_len: int, token_bytes: int) -> None:
    chosen = chunk_tokens(seq_len, token_bytes)

    def distance(tokens: int) -> float:
        wanted = LOGITS_BYTES / token_bytes
        return max(tokens / wanted, wanted / tokens)

    divisors = [d for d in range(1, seq_len + 1) if seq_len % d == 0]
    assert chosen in divisors and distance(chosen) == min(map(distance, divisors))


def test_the_page_says_what_runs() -> None:
    page = plan_page(plan(8192, 16))
    assert "Loss: 2048 tokens of a row at a time, in 4 chunks, 1.96 GiB of float32 logits" in page
    assert "Loss: all 2048 tokens of a row at once, 1001.98 MiB of float32" in plan_page(plan(2048, 8))
