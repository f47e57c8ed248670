"""Marks: the named places in the model where passes from outside may act on an activation.

The model calls `marks(x, name, dims)` on the activations that matter. By default nothing happens. A backend
adds functions that constrain how `x` is sharded (by its dims) or decide whether the backward pass keeps it
(by its name), so that the model itself knows neither meshes nor memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Mark = Callable[[torch.Tensor, str, tuple[str, ...]], torch.Tensor]


class Marks:
    """An ordered list of functions applied to every marked activation."""

    def __init__(self) -> None:
        self.functions: list[Mark] = []

    def __call__(self, x: torch.Tensor, name: str, *dims: str) -> torch.Tensor:
        assert len(dims) == x.ndim, f"{name}: {len(dims)} dim names for a tensor of {x.ndim} dims"
        for function in self.functions:
            x = function(x, name, dims)
        return x
