"""Records that share rows beside records in rows of their own: the same loss and gradients, no leak."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch

from tests import small
from tests.families import CONFIGS, model_of
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config.schema import DataSection
from tptrain.data.batches import Batch, Batches
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.rendered import Rendered
from tptrain.models.calling import call_method
from tptrain.train.state import fresh_state, part_of
from tptrain.train.step import BATCH_NAMES, loss_and_gradients

SEQ_LEN = small.TOKENS
RECORDS = 23
DENSE = [name for name, config in CONFIGS.items() if "num_experts_per_tok" not in config]
MIXTURES = [name for name in CONFIGS if name not in DENSE]


@cache
def dataset() -> TokenizedDataset:
    rng = np.random.default_rng(8)
    rows = []
    for _ in range(RECORDS):
        length = int(rng.integers(2, SEQ_LEN * 2 // 3))
        mask = rng.random(length) < 0.6
        mask[-1] = True
        rows.append(Rendered(rng.integers(0, small.VOCAB, length, dtype=np.int32), mask))
    return TokenizedDataset.of(rows, 0)


def whole_epoch(packing: Literal["none", "best_fit"]) -> Batch:
    """All records, in one batch."""
    section = DataSection(seq_len=SEQ_LEN, seed=1, packing=packing)
    rows = Batches(dataset(), section, 1, None).num_samples
    return Batches(dataset(), replace(section, batch_rows=rows), 1, None).batch_at(0)


def loss_and_gradients_of(batch: Batch, name: str, format: str) -> tuple[torch.Tensor, Tensors]:
    backend = TorchBackend(small.torch_plan(config=CONFIGS[name], format=format))
    decoder = backend.decoder()
    dtype = torch.float64 if format == "float64" else torch.float32
    source = {n: tensor.to(dtype) for n, tensor in small.weights_of(model_of(name)).items()}
    params = part_of(fresh_state(backend, small.DictSource(source)), "params")
    working = {n: tensor.clone().requires_grad_(True) for n, tensor in params.items()}
    constants = {n: t.to(dtype) if t.is_floating_point() else t for n, t in decoder.constants().items()}
    inputs = backend.put_batch({n: getattr(batch, n) for n in BATCH_NAMES})
    loss, counted, gradients = loss_and_gradients(decoder, {**working, **constants}, working, inputs)
    assert counted.item() == batch.counted_tokens
    return loss, gradients


@pytest.mark.parametrize(
    ("format", "loss_gap", "gradient_gap"), [("float32", 1e-6, 1e-5), ("float64", 1e-13, 1e-10)]
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_loss_and_gradients(name: str, format: str, loss_gap: float, gradient_gap: float) -> None:
    alone, packed = whole_epoch("none"), whole_epoch("best_fit")
    assert packed.counted_tokens == alone.counted_tokens and packed.real_tokens == alone.real_tokens
    assert packed.padded_tokens < alone.padded_tokens / 4
    loss, gradients = loss_and_gradients_of(alone, name, format)
    packed_loss, packed_gradients = loss_and_gradients_of(packed, name, format)
    assert abs(packed_loss - loss).item() <= loss_gap * loss.item()
    assert gradients.keys() == packed_gradients.keys()
    for buffer, gradient in gradients.items():
        assert small.difference(packed_gradients[buffer], gradient) <= gradient_gap, buffer


def logits(name: str, arrays: dict[str, Any]) -> torch.Tensor:
    backend = TorchBackend(small.torch_plan(config=CONFIGS[name]))
    decoder = backend.decoder()
    weights = small.weights_of(model_of(name))
    params = part_of(fresh_state(backend, small.DictSource(weights)), "params")
    given = tuple(torch.from_numpy(arrays[n]) for n in ("tokens", "positions", "segment_ids"))
    with torch.no_grad():
        found: torch.Tensor = call_method(decoder, "forward", {**params, **decoder.constants()}, given)
    return found


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_neighbours_do_not_see_what_changes_in_a_record(name: str) -> None:
    batch = whole_epoch("best_fit")
    arrays = {n: getattr(batch, n)[0] for n in ("tokens", "positions", "segment_ids")}
    second = arrays["segment_ids"] == 2
    assert second.any(), "no row has two records"
    changed = (arrays["tokens"] + second * 7) % small.VOCAB
    before, after = logits(name, arrays), logits(name, {**arrays, "tokens": changed.astype(np.int32)})
    others = torch.from_numpy((arrays["segment_ids"] > 0) & ~second)
    gap = (after - before).abs().amax(-1)
    assert gap[torch.from_numpy(second)].max() > 0.1, "the change did not reach the model"
    bound = 0.0 if name in DENSE else 1e-5 * before.abs().max().item()
    assert gap[others].max() <= bound
