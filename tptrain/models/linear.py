"""The projections of a layer: linear maps that may carry an adapter.

Shapes: B batch, T tokens, D model, N heads, H head dim, R rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tptrain.family import ParamRow, adapted_modules
from tptrain.models.marks import Marks


class Linear(nn.Linear):
    """y = x W^T + bias, with an adapter (LoRA, arXiv:2106.09685) + scale * (x A^T) B^T.

    Attention has heads as a dim of their own in its products: of a flat product the TPU's compiler lays the
    result out once more before attention can read it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, marks: Marks):
        super().__init__(in_features, out_features, bias)
        self.marks, self.scale = marks, 0.0
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None

    def adapt(self, rank: int, scale: float) -> None:
        """Give it an adapter."""
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, in] -> [B, T, out]."""
        y = super().forward(x)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + self.lora_B(self._low(self.lora_A(x)))

    def to_heads(self, x: torch.Tensor, head_dim: int) -> torch.Tensor:
        """x [B, T, D] -> [B, T, N, H]."""
        heads = torch.einsum("btd,nhd->btnh", x, self.weight.unflatten(0, (-1, head_dim)))
        if self.bias is not None:
            heads = heads + self.bias.unflatten(0, (-1, head_dim))
        if self.lora_A is None or self.lora_B is None:
            return heads
        up = self.lora_B.weight.unflatten(0, (-1, head_dim))
        return heads + torch.einsum("btr,nhr->btnh", self._low(self.lora_A(x)), up)

    def from_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """heads [B, T, N, H] -> [B, T, D]."""
        head_dim = heads.shape[-1]
        x = torch.einsum("btnh,dnh->btd", heads, self.weight.unflatten(1, (-1, head_dim)))
        if self.bias is not None:
            x = x + self.bias
        if self.lora_A is None or self.lora_B is None:
            return x
        down = self.lora_A.weight.unflatten(1, (-1, head_dim))
        return x + self.lora_B(self._low(torch.einsum("btnh,rnh->btr", heads, down)))

    def _low(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, R]: scaled where it is smallest."""
        return self.marks(x * self.scale, "adapter", "act_batch", "act_tokens", "act_rank")


def add_adapters(model: nn.Module, table: Iterable[ParamRow], rank: int, scale: float) -> None:
    """Give every projection that has an adapter in the table its own, in place."""
    for name in adapted_modules(table):
        module = model.get_submodule(name)
        assert isinstance(module, Linear), f"{name} is no projection"
        module.adapt(rank, scale)
