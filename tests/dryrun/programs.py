"""Writes the programs of these tests as serialized HLO modules: `python -m tests.dryrun.programs DIR`.

In a process of its own, so that the tests' process starts no JAX: XLA_FLAGS and devices hold for a process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

P = PartitionSpec
# L layers of B rows; no two sizes are equal.
L, B, D, F = 3, 24, 512, 1280


def mesh_of(fsdp: int, tensor: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: fsdp * tensor]).reshape(fsdp, tensor), ("fsdp", "tensor"))


def array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def train_step(mesh: Mesh) -> Any:
    """A step of a small network: a loop over layers whose fp32 weights are gathered in bfloat16, and SGD."""

    def loss(weights: dict[str, Any], x: Any) -> Any:
        def layer(carry: Any, layer_weights: dict[str, Any]) -> tuple[Any, None]:
            hidden = jax.nn.relu(carry @ layer_weights["up"].astype(jnp.bfloat16))
            out = hidden @ layer_weights["down"].astype(jnp.bfloat16)
            return jax.lax.with_sharding_constraint(carry + out, NamedSharding(mesh, P("fsdp", None))), None

        y, _ = jax.lax.scan(layer, x, weights)
        return (y.astype(jnp.float32) ** 2).sum()

    def step(weights: dict[str, Any], x: Any) -> tuple[dict[str, Any], Any]:
        value, gradients = jax.value_and_grad(loss)(weights, x)
        return jax.tree.map(lambda a, b: a - 0.1 * b, weights, gradients), value

    weights = {
        "down": array(mesh, (L, F, D), jnp.float32, P(None, "tensor", "fsdp")),
        "up": array(mesh, (L, D, F), jnp.float32, P(None, "fsdp", "tensor")),
    }
    x = array(mesh, (B, D), jnp.bfloat16, P("fsdp", None))
    shardings = {name: one.sharding for name, one in weights.items()}
    out = (shardings, NamedSharding(mesh, P()))
    return jax.jit(step, donate_argnums=0, out_shardings=out).lower(weights, x)


def batched_products(mesh: Mesh) -> Any:
    """Products over batch dims, which libtpu writes as convolutions with windows."""
    q = array(mesh, (6, 4, 40, 48), jnp.bfloat16, P("fsdp", "tensor"))
    k = array(mesh, (6, 4, 56, 48), jnp.bfloat16, P("fsdp", "tensor"))
    return jax.jit(lambda q, k: jnp.einsum("bnth,bnsh->bnts", q, k)).lower(q, k)


def too_large(mesh: Mesh) -> Any:
    """A product of large matrices: 28 GiB on each of four chips."""
    x = array(mesh, (65536, 81920), jnp.float32, P("fsdp", "tensor"))
    w = array(mesh, (81920, 65536), jnp.float32, P("fsdp", "tensor"))

    def f(x: Any, w: Any) -> Any:
        y = jax.nn.relu(x @ w)
        return y + 1, y * 2

    return jax.jit(f).lower(x, w)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    # Shardings as GSPMD's, which is what torch_xla traces.
    jax.config.update("jax_use_shardy_partitioner", False)
    folder = Path(sys.argv[1])
    lowered = {
        "step": train_step(mesh_of(2, 2)),
        "step_4x2": train_step(mesh_of(4, 2)),
        "batched": batched_products(mesh_of(2, 2)),
        "too_large": too_large(mesh_of(2, 2)),
        "unsharded": jax.jit(lambda x: (x @ x).sum()).lower(jax.ShapeDtypeStruct((256, 256), jnp.float32)),
    }
    for name, one in lowered.items():
        module = one.compiler_ir("hlo").as_serialized_hlo_module_proto()
        (folder / f"{name}.pb").write_bytes(module)


if __name__ == "__main__":
    main()
