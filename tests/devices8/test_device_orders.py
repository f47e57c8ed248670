"""Orders of devices in which XLA multiplies matrices rightly, and orders refused because it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch_xla
import torch_xla.distributed.spmd as xs

from tests import small
from tptrain.backends.xla.sharding import DeviceMesh, partition_spec
from tptrain.errors import ProblemsError
from tptrain.jaxside.device_order import device_order
from tptrain.mesh import AXES, MeshShape, Spec
from tptrain.topology import parse_topology

ALL = MeshShape((2, 2, 1, 1, 2), (1,) * 5)
IRREGULAR = (5, 2, 7, 0, 3, 6, 1, 4)
RING = (0, 1, 2, 3, 7, 6, 5, 4)
ORDERS = {
    "v6e-8": device_order(parse_topology("v6e-8"), ALL.ici, ALL.dcn),
    "v5p-16": device_order(parse_topology("v5p-16"), ALL.ici, ALL.dcn),
    "axes exchanged and reversed": (6, 2, 7, 3, 4, 0, 5, 1),
}

# Of x[B, C] and y[B, D] into x^T y [C, D]: the specs of a gradient as q_proj's, and of one over fsdp alone.
PRODUCTS: dict[str, tuple[Spec, Spec, Spec]] = {
    "gradient": ((("data", "fsdp"), ()), (("data", "fsdp"), ("tensor",)), (("fsdp",), ("tensor",))),
    "replicated": ((("fsdp",), ()), (("data",), ("tensor",)), ((), ("data", "tensor"))),
}


def error(mesh: xs.Mesh, specs: tuple[Spec, Spec, Spec], rows: int, left: int, right: int) -> float:
    """Largest error over all replicas of a product on that mesh, as a share of its largest element."""
    generator = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(rows, size, generator=generator) for size in (left, right))
    expected = x.T @ y
    left_spec, right_spec, out_spec = (partition_spec(spec) for spec in specs)
    x_there = xs.mark_sharding(x.to("xla"), mesh, left_spec).global_tensor
    y_there = xs.mark_sharding(y.to("xla"), mesh, right_spec).global_tensor
    marked = xs.mark_sharding(x_there.T @ y_there, mesh, out_spec)
    torch_xla.sync(wait=True)
    found = [
        (shard.data - expected[... if shard.indices is Ellipsis else tuple(shard.indices)]).abs().max().item()
        for shard in marked.local_shards
    ]
    assert len(found) == 8
    return max(found) / expected.abs().max().item()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("specs", PRODUCTS)
def test_products_are_right_in_orders_that_pass(order: str, specs: str) -> None:
    mesh = DeviceMesh(ALL, ORDERS[order]).xla
    for sizes in ((256, 120, 240), (16, 16, 64)):
        assert error(mesh, PRODUCTS[specs], *sizes) < 1e-5


@pytest.mark.parametrize(
    ("order", "specs", "sizes"),
    [(IRREGULAR, "gradient", (256, 120, 240)), (RING, "replicated", (16, 16, 64))],
)
def test_xla_is_wrong_in_orders_that_are_refused(
    order: tuple[int, ...], specs: str, sizes: tuple[int, int, int]
) -> None:
    """A right product here means that XLA has been mended, and that the refusal may go."""
    raw = xs.Mesh(np.array(order), ALL.sizes, AXES)
    assert error(raw, PRODUCTS[specs], *sizes) > 0.1
    with pytest.raises(ProblemsError, match=r"mesh=data=2 x .*: replicas over (data|fsdp), by"):
        DeviceMesh(ALL, order)


def test_a_refusal_names_the_axes_and_the_ordinals() -> None:
    plan = small.small_plan(4, 2)
    with pytest.raises(ProblemsError) as caught:
        DeviceMesh(plan.mesh, RING)
    (problem,) = caught.value.problems
    assert problem.setting == "mesh" and problem.value == "fsdp=4 x tensor=2"
    assert "replicas over tensor" in problem.rule and "0, 1, 2, 3, 7, 6, 5, 4" in problem.other


@pytest.mark.parametrize("order", [IRREGULAR, RING])
def test_a_mesh_of_one_axis_takes_any_order(order: tuple[int, ...]) -> None:
    assert DeviceMesh(MeshShape((1, 8, 1, 1, 1), (1,) * 5), order).order == order
