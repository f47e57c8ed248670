"""A JAX function as an HLO module that another framework can call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax import export
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import xla_client  # jaxlib's conversion from StableHLO to HLO has no public name
from jax._src.lib.mlir.dialects import hlo

# jaxlib's bindings of StableHLO have no type stubs for what is used here.
_hlo: Any = hlo

# A Pallas kernel. jax.export does not promise that an exported one still runs on a TPU of years to come;
# here it is compiled in the same run.
_PALLAS_CALL = export.DisabledSafetyCheck.custom_call("tpu_custom_call")

Platform = Literal["cpu", "tpu"]


def lower_to_hlo(
    function: Callable[..., Any], arguments: Sequence[jax.ShapeDtypeStruct], platform: Platform
) -> bytes:
    """The serialized HLO module of `function` on one device; its result is a tuple, also for one array."""
    return jitted_to_hlo(jax.jit(function, keep_unused=True), arguments, platform)


def jitted_to_hlo(jitted: Any, arguments: Sequence[Any], platform: Platform) -> bytes:
    """The same of a `jax.jit` function, of trees of shapes, with the shardings that it was given.

    The module's parameters are the leaves of the arguments, if `keep_unused` holds. The compilers here take
    shardings in GSPMD's form: with several devices `jax_use_shardy_partitioner` must be off.

    It goes through jax.export, which lowers for a platform that is not attached, and in the
    forward-compatible form: a libtpu that is older than jaxlib (0.0.21, which torch_xla 2.9 runs) refuses
    the Pallas kernels of `jax.jit(...).lower()`.
    """
    exported = export.export(jitted, platforms=[platform], disabled_checks=[_PALLAS_CALL])(*arguments)
    # jax's stubs do not know the option.
    assert exported.nr_devices == 1 or not getattr(jax.config, "jax_use_shardy_partitioner")  # noqa: B009
    computation = xla_client._xla.mlir.mlir_module_to_xla_computation(
        _with_names(exported.mlir_module_serialized), use_tuple_args=False, return_tuple=True
    )
    return computation.as_serialized_hlo_module_proto()


def _with_names(serialized: bytes) -> str:
    """The exported module as text with its locations: from them the kernels have their names in HLO."""
    with jax_mlir.make_ir_context() as context:
        module = _hlo.deserialize_portable_artifact(context, serialized)
        text: str = module.operation.get_asm(enable_debug_info=True)
    return text
