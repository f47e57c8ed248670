"""Calling any method of a module with tensors in the place of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


class _Method(nn.Module):
    """A module whose forward is another method of `module`, so that `functional_call` can reach it."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self._method = module, method

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.module, self._method)(*arguments)


def call_method(
    module: nn.Module, method: str, tensors: Mapping[str, torch.Tensor], arguments: tuple[Any, ...]
) -> Any:
    """`module.method(*arguments)`; `tensors`, by the module's own names, are its parameters and buffers."""
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_Method(module, method), prefixed, arguments)
