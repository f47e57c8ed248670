"""Grouped products in the traced graph, split over eight devices, against the plain core in float64.

The kernels run in the Pallas interpreter: the same programs as on a TPU, tile by tile, in slow motion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch_xla

from tests import small
from tests.experts.routings import routing
from tptrain.backends.xla.capture import compile_count
from tptrain.backends.xla.experts import ExpertsKernel, GroupedExperts
from tptrain.backends.xla.sharding import DeviceMesh
from tptrain.mesh import STYLES, MeshShape, spec_of
from tptrain.models.decoder import ACTIVATIONS
from tptrain.models.experts import ExpertsCore, every_expert
from tptrain.models.marks import Marks

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
IDENTITY = tuple(range(8))
RULES = STYLES["fsdp+tensor"]
ACTS = {
    "x": ("act_batch", "act_tokens", "act_embed"),
    "weights": ("act_batch", "act_tokens", "act_choices"),
    "choices": ("act_batch", "act_tokens", "act_choices"),
    "gradient": ("act_batch", "act_tokens", "act_embed"),
}
PARAMS = {
    "gate": ("experts", "expert_mlp", "expert_embed"),
    "up": ("experts", "expert_mlp", "expert_embed"),
    "down": ("experts", "expert_embed", "expert_mlp"),
}
SPECS = {name: spec_of(dims, RULES.acts) for name, dims in ACTS.items()} | {
    name: spec_of(dims, RULES.params) for name, dims in PARAMS.items()
}
GIVEN = ("x", "weights", "gate", "up", "down")

# max|ours - reference| / max|reference|. In bfloat16 hidden values, results and parts of sums are rounded.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """mesh: sizes of data, fsdp, expert and tensor."""

    mesh: tuple[int, int, int, int]
    order: tuple[int, ...] = PERMUTED
    tokens: int = 6
    choices: int = 2
    experts: int = 8
    kind: str = "even"
    activation: str = "silu"
    dtype: torch.dtype = torch.float32


CASES = {
    "data alone": Case((8, 1, 1, 1), choices=1, experts=5),
    "fsdp": Case((1, 8, 1, 1), choices=3, activation="gelu_pytorch_tanh"),
    "expert": Case((1, 1, 8, 1), IDENTITY),
    "fsdp x expert": Case((1, 4, 2, 1), choices=8, experts=10),
    "expert, many to few": Case((1, 2, 4, 1), IDENTITY, kind="empty", experts=12),
    "expert x tensor, all to one": Case((1, 1, 4, 2), PERMUTED, kind="one", choices=1),
    "tensor x expert": Case((1, 2, 2, 2)),
    "data x fsdp x expert": Case((2, 2, 2, 1), choices=3, experts=6),
    "data x fsdp x tensor": Case((2, 2, 1, 2), experts=3, choices=1),
    "bfloat16": Case((1, 2, 2, 2), dtype=torch.bfloat16),
}


def tensors_of(case: Case) -> dict[str, torch.Tensor]:
    """All that the core is given, and the gradient of its result, on the host."""
    generator = torch.Generator().manual_seed(case.choices)
    embed, mlp = 24, 40
    tokens = (small.ROWS, case.tokens)
    shapes = {
        "x": (*tokens, embed),
        "weights": (*tokens, case.choices),
        "gate": (case.experts, mlp, embed),
        "up": (case.experts, mlp, embed),
        "down": (case.experts, embed, mlp),
        "gradient": (*tokens, embed),
    }
    random = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    # Or gelu's arguments would be so large that its gradient is a difference of nearly equal numbers.
    for name in PARAMS:
        random[name] *= 0.3
    return {name: tensor.to(case.dtype) for name, tensor in random.items()}


def with_gradients(
    core: ExpertsCore, case: Case, given: dict[str, torch.Tensor], choices: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The result as "y" and the gradients of all that was given."""
    leaves = {name: given[name].detach().requires_grad_(True) for name in GIVEN}
    x, weights, *matrices = leaves.values()
    y = core(x, weights, choices, *matrices, ACTIVATIONS[case.activation])  # type: ignore[index]
    gradients = torch.autograd.grad(y, list(leaves.values()), given["gradient"])
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def run_plain(case: Case, choices: torch.Tensor) -> dict[str, torch.Tensor]:
    given = {name: tensor.double() for name, tensor in tensors_of(case).items()}
    return with_gradients(partial(every_expert, marks=Marks()), case, given, choices)


def run_grouped(case: Case, choices: torch.Tensor) -> dict[str, torch.Tensor]:
    data, fsdp, expert, tensor = case.mesh
    mesh = DeviceMesh(MeshShape((data, fsdp, expert, 1, tensor), (1,) * 5), case.order)
    given = {name: mesh.place_full(tensor, SPECS[name]) for name, tensor in tensors_of(case).items()}
    placed = mesh.place_full(choices, SPECS["choices"])
    core = GroupedExperts(ExpertsKernel(mesh, RULES, "cpu"), Marks(), case.activation)  # type: ignore[arg-type]
    results = with_gradients(core, case, given, placed)
    for name, result in results.items():
        assert result.dtype == case.dtype
        mesh.mark(result, SPECS["x" if name == "y" else name])
    torch_xla.sync()
    return {name: mesh.gather(result) for name, result in results.items()}


def choices_of(case: Case, seed: int = 0) -> torch.Tensor:
    return routing(case.kind, (small.ROWS, case.tokens), case.choices, case.experts, seed)


@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_equal_the_plain_core(name: str) -> None:
    case = CASES[name]
    expected, ours = run_plain(case, choices_of(case)), run_grouped(case, choices_of(case))
    for part, theirs in expected.items():
        assert small.difference(ours[part].double(), theirs) <= TOLERANCE[case.dtype], part


def test_another_routing_compiles_nothing() -> None:
    case = CASES["data x fsdp x expert"]
    first = run_grouped(case, choices_of(case, 1))
    count = compile_count()
    others = run_grouped(case, choices_of(case, 2))
    assert compile_count() == count
    assert small.difference(others["y"], first["y"]) > 0.1
    assert small.difference(others["y"].double(), run_plain(case, choices_of(case, 2))["y"]) <= 1e-5
