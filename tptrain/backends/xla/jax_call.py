"""Calling a module that JAX lowered from the traced graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch_xla
import torch_xla.core.xla_builder as xb

TracedCall = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


@cache
def traced_call(name: str, hlo: bytes) -> TracedCall:
    """A function over traced tensors whose body is `hlo`, a serialized HLO module that returns a tuple.

    It adds a call to the graph and computes nothing, so it takes placeholders too; it has no gradient. The
    tensors must have the shapes and dtypes of the module's parameters.
    """
    computation = xb.computation_from_module_proto(name, hlo)
    return lambda tensors: torch_xla._XLAC._xla_user_computation(f"xla::{name}", list(tensors), computation)
