"""The kernel in the traced graph, split over eight devices, against plain attention in float64.

The kernel runs in the Pallas interpreter: the same program as on a TPU, tile by tile, in slow motion.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch_xla

from tests import small
from tptrain.backends.xla.sharding import DeviceMesh
from tptrain.backends.xla.splash import SplashKernel, splash_core
from tptrain.config.kernels import SplashBlocks
from tptrain.mesh import STYLES, MeshShape, spec_of
from tptrain.models.attention import AttentionCore, AttentionKind, PlainAttention
from tptrain.models.marks import Marks

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
ACTS = STYLES["fsdp+tensor"].acts
DIMS = {
    "query": ("act_batch", "act_tokens", "act_heads", "act_head_dim"),
    "key": ("act_batch", "act_tokens", "act_kv_heads", "act_head_dim"),
    "value": ("act_batch", "act_tokens", "act_kv_heads", "act_head_dim"),
}

# max|ours - reference| / max|reference|. In float32 both sums run over at most 512 keys: a few units of the
# last place (1.2e-7). In bfloat16 results are rounded once (3.9e-3), and scores enter with rounded queries.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


SMALL_TILES = SplashBlocks(128, 128, 128)


@dataclass(frozen=True)
class Case:
    """mesh: sizes of data, fsdp and tensor."""

    mesh: tuple[int, int, int]
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    soft_cap: float | None = None
    blocks: SplashBlocks = SMALL_TILES
    dtype: torch.dtype = torch.float32


CASES = {
    "grouped": Case((1, 4, 2), 256, 4, 2, 32),
    "window": Case((1, 8, 1), 384, 6, 2, 10, window=101, blocks=SplashBlocks(128, 384, 128)),
    "one past a tile": Case((2, 4, 1), 256, 3, 3, 16, window=129),
    "soft cap, one backward kernel": Case(
        (2, 2, 2), 256, 6, 2, 24, soft_cap=0.7, blocks=SplashBlocks(128, 128, 128, fused_backward=True)
    ),
    "window and cap, large tiles": Case(
        (1, 2, 4), 512, 8, 4, 12, 200, 1.3, SplashBlocks(256, 512, 256, fused_backward=True)
    ),
    "one kv head": Case((8, 1, 1), 256, 5, 1, 20, soft_cap=2.0),
    "bfloat16": Case((1, 4, 2), 256, 4, 2, 64, window=70, dtype=torch.bfloat16),
}


def tensors_of(case: Case) -> dict[str, torch.Tensor]:
    """Query, key, value and the gradient of the result, in the format of the case, on the host."""
    generator = torch.Generator().manual_seed(case.tokens + case.head_dim)

    def random(heads: int) -> torch.Tensor:
        shape = (small.ROWS, case.tokens, heads, case.head_dim)
        return torch.randn(shape, generator=generator).to(case.dtype)

    heads = {"query": case.heads, "key": case.kv_heads, "value": case.kv_heads, "gradient": case.heads}
    return {name: random(count) for name, count in heads.items()}


def with_gradients(
    core: AttentionCore, kind: AttentionKind, given: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The attended values and the three gradients."""
    leaves = {name: given[name].detach().requires_grad_(True) for name in DIMS}
    attended = core(*leaves.values(), kind)
    gradients = torch.autograd.grad(attended, list(leaves.values()), given["gradient"])
    return {"attended": attended.detach(), **dict(zip(leaves, gradients, strict=True))}


def run_plain(case: Case, ids: torch.Tensor, kind: AttentionKind) -> dict[str, torch.Tensor]:
    core = PlainAttention.of_segments(ids, [case.window], Marks())
    return with_gradients(core, kind, {name: t.double() for name, t in tensors_of(case).items()})


def run_splash(case: Case, ids: torch.Tensor, kind: AttentionKind) -> dict[str, torch.Tensor]:
    data, fsdp, tensor = case.mesh
    mesh = DeviceMesh(MeshShape((data, fsdp, 1, 1, tensor), (1,) * 5), PERMUTED)
    specs = {name: spec_of(DIMS.get(name, DIMS["query"]), ACTS) for name in tensors_of(case)}
    given = {name: mesh.place_full(t, specs[name]) for name, t in tensors_of(case).items()}
    placed_ids = mesh.place_full(ids, spec_of(("act_batch", "act_tokens"), ACTS))
    kernel = SplashKernel(mesh, ACTS, case.blocks, "cpu")
    results = with_gradients(splash_core(kernel, Marks())(placed_ids, [case.window]), kind, given)
    for name, result in results.items():
        assert result.dtype == case.dtype
        mesh.mark(result, spec_of(DIMS.get(name, DIMS["query"]), ACTS))
    torch_xla.sync()
    return {name: mesh.gather(result) for name, result in results.items()}


@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_equal_plain_attention(name: str) -> None:
    case = CASES[name]
    ids = torch.from_numpy(small.packed_rows(case.tokens).segment_ids)
    kind = AttentionKind(case.head_dim**-0.5, case.window, case.soft_cap)
    expected, ours = run_plain(case, ids, kind), run_splash(case, ids, kind)
    for part, theirs in expected.items():
        assert small.difference(ours[part].double(), theirs) <= TOLERANCE[case.dtype], part


def test_the_cases_would_show_a_missing_feature() -> None:
    """Plain attention without window, cap, segments or grouping differs by far more than the tolerance."""
    case = Case((1, 1, 1), 256, 4, 2, 12, window=100, soft_cap=1.3)
    ids = torch.from_numpy(small.packed_rows(case.tokens).segment_ids)
    scale = case.head_dim**-0.5
    right = run_plain(case, ids, AttentionKind(scale, case.window, case.soft_cap))
    core_windows = [None, case.window, case.window - 1, case.window + 1]
    given = {name: t.double() for name, t in tensors_of(case).items()}
    wrong_kinds = [(ids, AttentionKind(scale, case.window, None))]
    wrong_kinds += [(ids, AttentionKind(scale, w, case.soft_cap)) for w in core_windows if w != case.window]
    wrong_kinds += [(torch.ones_like(ids), AttentionKind(scale, case.window, case.soft_cap))]
    for wrong_ids, kind in wrong_kinds:
        core = PlainAttention.of_segments(wrong_ids, core_windows, Marks())
        wrong = with_gradients(core, kind, given)
        for part, theirs in right.items():
            assert small.difference(wrong[part], theirs) > 100 * TOLERANCE[torch.float32], (part, kind)
