"""Whether a checkpoint is still the one that it was, told by a few reads of each of its tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from tptrain.weights.safetensors_files import open_checkpoint
from tptrain.weights.safetensors_header import read_exactly
from tptrain.weights.stored_tensor import StoredTensor

_SAMPLE_BYTES = 4096


def weight_fingerprints(folder: Path, setting: str) -> dict[str, str]:
    """Safetensors file of a checkpoint -> XXH3-128 of its tensors' names, places, and samples of their bytes.

    Samples are the first, the middle and the last 4 KiB of each tensor.

    Training changes every tensor everywhere, so another model shows; a single number changed by hand may not.
    setting: where the user named the folder. Raises ProblemsError for a folder that is no checkpoint.
    """
    by_file: dict[str, list[StoredTensor]] = {}
    for tensor in open_checkpoint(folder, setting).values():
        by_file.setdefault(tensor.file, []).append(tensor)
    return {name: _fingerprint(by_file[name]) for name in sorted(by_file)}


def _fingerprint(tensors: list[StoredTensor]) -> str:
    digest = xxhash.xxh3_128()
    with tensors[0].path.open("rb", buffering=0) as file:
        for tensor in sorted(tensors, key=lambda each: each.name):
            digest.update(f"{tensor.name} {tensor.extent}".encode())
            _sample(digest, tensor, file.fileno())
    return digest.hexdigest()


def _sample(digest: xxhash.xxh3_128, tensor: StoredTensor, descriptor: int) -> None:
    start, stop = tensor.extent.start, tensor.extent.stop
    size = min(_SAMPLE_BYTES, stop - start)
    for at in (start, (start + stop - size) // 2, stop - size):
        sample = np.empty(size, np.uint8)
        read_exactly(descriptor, sample, at)
        digest.update(sample.data)
