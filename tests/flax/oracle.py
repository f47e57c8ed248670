"""The torch decoder as the oracle of the Flax one: the same weights, rows and facts for both."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.func import functional_call

from tests import small
from tptrain.backends.base import TORCH_DTYPES, Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config import Plan
from tptrain.family import LayerKind, ModelFacts, facts_from_config
from tptrain.jaxside.flax_decoder import FlaxDecoder
from tptrain.models.decoder import Decoder
from tptrain.train.state import fresh_state, part_of
from tptrain.train.step import make_train_step

Arrays = dict[str, jax.Array]

CONFIGS: dict[str, dict[str, Any]] = {
    "default": small.small_config(),
    "linear": small.small_config("linear"),
    "llama3": small.LLAMA3,
    "tied": small.LLAMA3_TIED,
    "biases": small.small_config(attention_bias=True, mlp_bias=True),
    "multi_head": small.small_config(num_key_value_heads=24),
    "one_kv_head": small.small_config(num_key_value_heads=1),
}
ROWS = {"padded": small.padded_rows(), "packed": small.packed_rows()}
# Llama's own period of layers, and one of two kinds in a depth of three.
FULL = (LayerKind(),)
WINDOWS = (LayerKind(4), LayerKind())


@cache
def weights_of(config: str) -> Tensors:
    return small.weights_of(small.reference_model(CONFIGS[config]))


def facts_of(config: str, **changes: Any) -> ModelFacts:
    return dataclasses.replace(facts_from_config(CONFIGS[config]), **changes)


def params_of(config: str, format: str = "float32") -> Arrays:
    """The weights as JAX arrays; float64 needs JAX's 64-bit mode."""
    return {name: jnp.asarray(tensor.numpy(), format) for name, tensor in weights_of(config).items()}


def flax_decoder(config: str) -> FlaxDecoder:
    return FlaxDecoder(facts_of(config), params_of(config))


def flax_logits(decoder: FlaxDecoder, rows: small.Rows) -> np.ndarray:
    """Logits [B, T, V], operation by operation: compiled ones are shared by all configs and mutations."""
    return np.asarray(decoder(rows.tokens, rows.positions, rows.segment_ids))


def torch_decoder(config: str, period: tuple[LayerKind, ...] = FULL) -> Decoder:
    with torch.device("meta"):
        return Decoder(facts_of(config, layer_period=period))


@cache
def torch_logits(
    config: str, rows: str, period: tuple[LayerKind, ...] = FULL, format: str = "float32"
) -> np.ndarray:
    """The oracle's logits at the real positions [tokens, V]; they are large enough to show a fault."""
    model = torch_decoder(config, period)
    weights = {name: tensor.to(TORCH_DTYPES[format]) for name, tensor in weights_of(config).items()}
    with torch.no_grad():
        logits = functional_call(model, {**weights, **model.constants()}, ROWS[rows].tensors())
    assert logits.dtype == TORCH_DTYPES[format]
    real = (logits.float() if format == "bfloat16" else logits).numpy()[ROWS[rows].real]
    assert real.std() >= 1, f"logits have a standard deviation of {real.std()}"
    return real


def relative(ours: Any, theirs: Any) -> float:
    """max|ours - theirs| / max|theirs|."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def gap(
    config: str,
    rows: str,
    params: Arrays | None = None,
    *,
    period: tuple[LayerKind, ...] = FULL,
    format: str = "float32",
    **facts: Any,
) -> float:
    """How far our logits are from the oracle's; `params` and `facts` are changes to ours alone."""
    changed = facts_of(config, **{"layer_period": period, **facts})
    ours = flax_logits(FlaxDecoder(changed, params or params_of(config, format)), ROWS[rows])
    assert ours.dtype == format
    wide = ours.astype(np.float32) if format == "bfloat16" else ours
    return relative(wide[ROWS[rows].real], torch_logits(config, rows, period, format))


@dataclasses.dataclass(frozen=True)
class Run:
    """Losses and gradient norms by step, and the weights after the last one."""

    losses: list[float]
    norms: list[float]
    params: dict[str, np.ndarray]


def train_on_torch(plan: Plan, weights: Tensors, steps: int) -> Run:
    """tptrain's own step on the torch backend, from these weights."""
    backend = TorchBackend(plan)
    decoder = backend.decoder()
    state = fresh_state(backend, small.DictSource(weights))
    step = make_train_step(decoder, backend.layout, plan.recipe)
    losses, norms = [], []
    for number in range(1, steps + 1):
        state, outputs = step(state, small.step_inputs(backend, plan, decoder.constants(), number))
        losses.append(outputs["loss"].item())
        norms.append(outputs["grad_norm"].item())
    return Run(losses, norms, {name: t.numpy() for name, t in part_of(state, "params").items()})
