"""Splash attention where there is no mesh: nothing is cut into pieces, the result is the same."""

from __future__ import annotations

import torch
import torch_xla

from tests import small
from tptrain.backends.xla.sharding import DeviceMesh
from tptrain.backends.xla.splash import SplashKernel, splash_core
from tptrain.config.kernels import SplashBlocks
from tptrain.mesh import STYLES, MeshShape
from tptrain.models.attention import AttentionKind, PlainAttention
from tptrain.models.marks import Marks


def test_result_and_gradients_equal_plain_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 256, heads, 20) for heads in (6, 2, 2, 6)]
    query, key, value, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    ids = torch.from_numpy(small.packed_rows(256).segment_ids)[:2]
    kind = AttentionKind(scale=0.3, window=150)

    leaves = [t.double().requires_grad_(True) for t in (query, key, value)]
    plain = PlainAttention.of_segments(ids, [150], Marks())(*leaves, kind)
    expected = [plain, *torch.autograd.grad(plain, leaves, gradient.double())]

    mesh = DeviceMesh(MeshShape((1,) * 5, (1,) * 5), (0,))
    kernel = SplashKernel(mesh, STYLES["fsdp+tensor"].acts, SplashBlocks(128, 256, 128), "cpu")
    leaves = [t.to("xla").requires_grad_(True) for t in (query, key, value)]
    attended = splash_core(kernel, Marks())(ids.to("xla"), [150])(*leaves, kind)
    ours = [attended, *torch.autograd.grad(attended, leaves, gradient.to("xla"))]
    torch_xla.sync()
    for mine, theirs in zip(ours, expected, strict=True):
        assert small.difference(mine.detach().cpu().double(), theirs.detach()) <= 2e-6
