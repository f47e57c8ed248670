"""A vocabulary that has grown, on eight devices: each has its slice of old rows, new ones and padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import small
from tptrain.backends.xla.backend import XlaBackend
from tptrain.train.grown_vocab import GrownVocab
from tptrain.weights import SafetensorsSource

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
MESHES = {"8x1": (8, 1), "2x4": (2, 4), "1x8": (1, 8)}
# With tensor=8 a device has 129 rows: the last has new ones and padding only, the one before it both kinds.
NEW = 150


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_device_gets_its_slice_of_old_and_new_rows(mesh: str, tied: bool, tmp_path: Path) -> None:
    config = small.LLAMA3_TIED if tied else small.LLAMA3
    plan = small.small_plan(*MESHES[mesh], config=config)
    held = {
        name: (tensor[:-NEW] if tensor.shape[0] == small.VOCAB else tensor).contiguous()
        for name, tensor in small.weights_of(small.reference(tied)).items()
    }
    save_file(held, tmp_path / "model.safetensors")
    source = GrownVocab(lambda table: SafetensorsSource(tmp_path, table), plan.table, NEW)
    backend = XlaBackend(plan, PERMUTED)
    placed = small.whole_rows(backend, plan, backend.place(source))
    grown = [name for name in placed if held[name].shape[0] == small.VOCAB - NEW]
    assert len(grown) == (1 if tied else 2)
    for name, tensor in placed.items():
        if name not in grown:
            assert torch.equal(tensor, held[name])
            continue
        assert torch.equal(tensor[: small.VOCAB - NEW], held[name])
        mean = held[name].double().mean(dim=0).float()
        new = tensor[small.VOCAB - NEW : small.VOCAB]
        assert torch.allclose(new, mean.expand(NEW, -1), rtol=0, atol=1e-9)
        assert not tensor[small.VOCAB :].any(), "padding is zeros"
    assert plan.padded_vocab > small.VOCAB or MESHES[mesh][1] == 1
