"""Checkpoints of the torch backend; those of a mesh are tested with eight devices."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import small
from tptrain.backends.torch_backend import TorchBackend
from tptrain.ckpt.checkpointer import Checkpointer


def test_tensors_changed_in_place_after_save_are_saved_as_they_were(tmp_path: Path) -> None:
    plan = small.torch_plan()
    backend = TorchBackend(plan)
    source = small.DictSource(small.weights_of(small.reference()))
    parts = {part: backend.place(source) for part in plan.parts}
    expected = {part: {n: t.clone() for n, t in buffers.items()} for part, buffers in parts.items()}
    checkpointer = Checkpointer(plan, backend, tmp_path / "checkpoints")
    try:
        checkpointer.save(1, parts, {"step": 1})
        for buffers in parts.values():
            for tensor in buffers.values():
                tensor.fill_(-1)
        checkpointer.wait()
        restored = checkpointer.restore(1, tuple(plan.parts), lambda run: None)
    finally:
        checkpointer.close()
    assert restored.run == {"step": 1}
    for part in plan.parts:
        assert set(restored.parts[part]) == set(expected[part])
        for name, tensor in restored.parts[part].items():
            assert torch.equal(tensor, expected[part][name]), (part, name)
