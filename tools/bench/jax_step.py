"""A train step of the Llama family as one writes it by hand in JAX: the yardstick of tools/bench/step_cpu.py.

Layers in a `lax.scan` over stacked parameters, shardings as NamedShardings, one `jit` with a donated state;
AdamW after clipping by global norm. The layers' mathematics is that of `tptrain.jaxside.flax_layers`.

Shapes: L layers, B rows, T tokens, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tptrain.config import OptimSection
from tptrain.family import ModelFacts
from tptrain.jaxside.flax_layers import attention_weights, causal_mask, inverse_frequencies, rotate, rotation

Arrays = dict[str, jax.Array]
State = dict[str, Arrays]
ROWS = P(("data", "fsdp"))
PREFIX = "model.layers.period.0."
# What the backward pass finds ready. On a CPU this took less time than keeping everything, every matrix
# product, or nothing.
KEPT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def make_step(
    facts: ModelFacts, optim: OptimSection, mesh: Mesh, specs: Mapping[str, P], decays: Mapping[str, bool]
) -> Callable[[State, Arrays], tuple[State, Arrays]]:
    """The compiled step (state, inputs) -> (state, outputs); the state is donated.

    state:  params, mu and nu by buffer name, layers stacked. inputs: the batch [B, T] and the scalars.
    specs, decays: of each buffer.
    """
    shardings = {
        part: {n: NamedSharding(mesh, s) for n, s in specs.items()} for part in ("params", "mu", "nu")
    }

    def step(state: State, inputs: Arrays) -> tuple[State, Arrays]:
        value, gradients = jax.value_and_grad(partial(mean_loss, facts, mesh))(state["params"], inputs)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in gradients.values()))
        updated = adamw(state, gradients, norm, inputs, optim, decays)
        return updated, {"loss": value, "grad_norm": norm}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def mean_loss(facts: ModelFacts, mesh: Mesh, params: Arrays, inputs: Arrays) -> jax.Array:
    """Mean negative log-likelihood over the counted tokens."""
    hold = partial(_hold, mesh)
    x = hold(params["model.embed_tokens.weight"][inputs["tokens"]], None, None)
    frequencies = inverse_frequencies(facts.rope, facts.head_dim)
    turn = rotation(inputs["positions"], frequencies, x.dtype)
    mask = causal_mask(inputs["segment_ids"], None)
    stacked = {n.removeprefix(PREFIX): p for n, p in params.items() if n.startswith(PREFIX)}

    def body(x: jax.Array, layer: Arrays) -> tuple[jax.Array, None]:
        return decoder_layer(facts, hold, layer, x, turn, mask), None

    x, _ = jax.lax.scan(jax.checkpoint(body, policy=KEPT, prevent_cse=False), x, stacked)
    x = _norm(x, params["model.norm.weight"], facts.rms_norm_eps)
    logits = hold(x @ params["lm_head.weight"].T, None, "tensor")
    is_target = jnp.arange(logits.shape[-1]) == inputs["targets"][..., None]
    at_target = jnp.where(is_target, logits, 0.0).sum(-1)
    likelihood = (jax.nn.logsumexp(logits, axis=-1) - at_target) * inputs["weights"]
    return likelihood.sum() / jnp.maximum(inputs["weights"].sum(), 1.0)


def decoder_layer(
    facts: ModelFacts,
    hold: Callable[..., jax.Array],
    layer: Arrays,
    x: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    mask: jax.Array,
) -> jax.Array:
    """One layer, x [B, T, D]; hold(x, *axes) states the sharding of an activation."""

    def project(x: jax.Array, name: str) -> jax.Array:
        return x @ layer[f"{name}.weight"].T

    def heads(x: jax.Array) -> jax.Array:
        return hold(x.reshape(*x.shape[:2], -1, facts.head_dim), None, "tensor", None)

    y = _norm(x, layer["input_layernorm.weight"], facts.rms_norm_eps)
    query, key, value = (heads(project(y, f"self_attn.{n}_proj")) for n in "qkv")
    query, key = rotate(query, *turn), rotate(key, *turn)
    grouped = query.reshape(*query.shape[:2], facts.num_key_value_heads, -1, facts.head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key)
    weights = attention_weights(scores, mask, facts.head_dim**-0.5)
    attended = jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(*x.shape[:2], -1)
    x = hold(x + project(attended, "self_attn.o_proj"), None, None)
    y = _norm(x, layer["post_attention_layernorm.weight"], facts.rms_norm_eps)
    gate, up = (hold(project(y, f"mlp.{n}_proj"), None, "tensor") for n in ("gate", "up"))
    return hold(x + project(jax.nn.silu(gate) * up, "mlp.down_proj"), None, None)


def adamw(
    state: State,
    gradients: Arrays,
    norm: jax.Array,
    inputs: Arrays,
    optim: OptimSection,
    decays: Mapping[str, bool],
) -> State:
    """AdamW with decoupled decay, after clipping by global norm."""
    scale = jnp.minimum(optim.clip_norm / (norm + 1e-6), 1.0)
    rate, correction1, correction2 = (
        inputs[name] for name in ("learning_rate", "bias_correction1", "bias_correction2")
    )
    new: State = {"params": {}, "mu": {}, "nu": {}}
    for name, old in state["params"].items():
        gradient = gradients[name] * scale
        mu = state["mu"][name] * optim.beta1 + gradient * (1 - optim.beta1)
        nu = state["nu"][name] * optim.beta2 + jnp.square(gradient) * (1 - optim.beta2)
        decay = rate * optim.weight_decay if decays[name] else 0.0
        step = (mu / correction1) / (jnp.sqrt(nu / correction2) + optim.eps)
        new["params"][name], new["mu"][name], new["nu"][name] = old * (1 - decay) - rate * step, mu, nu
    return new


def _norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return weight * (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps))


def _hold(mesh: Mesh, x: jax.Array, *axes: Any) -> jax.Array:
    """An activation whose rows are split over the batch axes, and the other dims as named."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*ROWS, *axes)))
