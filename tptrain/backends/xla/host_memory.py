"""Traced tensors that lie in the host's memory until they are needed again.

The calls are those of XLA's host offloader, which only its TPU compiler runs. It recognises a value that is
moved to the host and then written into a stack (the results of a scan), and a slice of such a stack that is
moved back: the whole stack then lies in pinned host memory, and the copies run beside compute. The SPMD
partitioner passes the calls through like any elementwise operation. They have no side effects, so that a
move whose result nobody reads is dropped.
"""

from __future__ import annotations

import torch
from torch_xla.experimental.stablehlo_custom_call import stablehlo_custom_call

# As in xla/service/host_memory_offload_annotations.h.
TO_HOST, TO_DEVICE = "MoveToHost", "MoveToDevice"


def to_host(x: torch.Tensor) -> torch.Tensor:
    """`x` in the host's memory; no gradient flows through it."""
    return _moved(x, TO_HOST)


def to_device(x: torch.Tensor) -> torch.Tensor:
    """`x`, which was moved to the host, back in the device's memory; no gradient flows through it."""
    return _moved(x, TO_DEVICE)


def _moved(x: torch.Tensor, target: str) -> torch.Tensor:
    moved: torch.Tensor = stablehlo_custom_call([x.detach()], target, [x.shape], [x.dtype])
    return moved
