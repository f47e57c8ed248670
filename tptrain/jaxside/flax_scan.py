"""The Flax decoder with its layers as one `lax.scan` over stacked parameters, as large models train.

A stack is named `model.layers.period.<position>.<parameter>` and has a leading layer dim; layer i lies at
index i // period of position i % period. All else is `FlaxDecoder`'s.

Shapes: L layers, B batch, T tokens, D model, V vocab.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tptrain.config.remat import KEPT
from tptrain.family import ModelFacts, parameter_table, stored_rows
from tptrain.jaxside.flax_decoder import check_params
from tptrain.jaxside.flax_layers import (
    Block,
    Body,
    CoreFactory,
    LayerContext,
    Linear,
    Mark,
    Params,
    PlainAttention,
    under,
    unmarked,
)
from tptrain.jaxside.flax_loss import LossChunks, chunked_loss

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def _as_it_is(name: str, array: jax.Array) -> jax.Array:
    return array


@dataclass(frozen=True)
class Passes:
    """What is done to a decoder from outside; the defaults do nothing.

    remat:     a policy of `remat.policy`: what the backward pass finds ready of each layer; in the device's
               memory, also under policies that offload.
    mark:      acts on activations by name and dims. Under other policies than full it must name what is to
               be kept, with `checkpoint_name`.
    hold:      (name of a stack, the array of one layer) -> the array, its sharding stated; the gradient's is
               then stated, too.
    attention: the core of attention.
    """

    remat: str = "full"
    mark: Mark = unmarked
    hold: Callable[[str, jax.Array], jax.Array] = _as_it_is
    attention: CoreFactory = PlainAttention


class ScannedLayers(nnx.Module):
    """The layers as one loop; stands where the list of layers stands."""

    def __init__(self, facts: ModelFacts, params: Params, passes: Passes):
        self.period = nnx.List(
            Block(facts, kind, under(params, f"period.{i}")) for i, kind in enumerate(facts.layer_period)
        )
        self.passes = passes

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        graph, stacked = nnx.split(self.period)

        def one_period(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            for block in nnx.merge(graph, jax.tree_util.tree_map_with_path(self._held, layer)):
                x = block(x, context)
            return x, None

        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[self.passes.remat])
        if self.passes.remat != "none":
            # The loop itself keeps XLA from joining a layer with its repetition.
            one_period = jax.checkpoint(one_period, policy=policy, prevent_cse=False)
        return jax.lax.scan(one_period, x, stacked)[0]

    def _held(self, path: tuple[Any, ...], array: jax.Array) -> jax.Array:
        return self.passes.hold(f"model.layers.period.{name_at(path)}", array)


class ScannedDecoder(nnx.Module):
    """A causal language model. params: as `stack_layers` gives them."""

    def __init__(self, facts: ModelFacts, params: Params, passes: Passes):
        layers = ScannedLayers(facts, under(params, "model.layers"), passes)
        self.model = Body(facts, under(params, "model"), layers, passes.attention, passes.mark)
        self.lm_head = None if facts.tie_word_embeddings else Linear(under(params, "lm_head"))
        self.passes = passes

    def mean_loss(self, batch: Mapping[str, jax.Array], chunks: LossChunks) -> jax.Array:
        """Mean negative log-likelihood over the counted tokens, a float32 (or wider) scalar.

        batch: tokens, targets, weights, positions, segment_ids, each [B, T].
        """
        hidden = self.model(batch["tokens"], batch["positions"], batch["segment_ids"])
        head = (self.lm_head or self.model.embed_tokens).weight[...]
        total = jnp.maximum(batch["weights"].sum(), 1.0)
        return chunked_loss(hidden, head, batch["targets"], batch["weights"], total, chunks, self.passes.mark)


def stack_layers(facts: ModelFacts, params: Params) -> dict[str, jax.Array]:
    """The parameters of a checkpoint, those of layers stacked. Raises ProblemsError as `FlaxDecoder` does."""
    check_params(facts, params)
    stacks: dict[str, list[jax.Array]] = {}
    for row in stored_rows(parameter_table(facts)):
        name = stacked_name(row.name, len(facts.layer_period))
        stacks.setdefault(name, []).append(params[row.name])
    return {n: jnp.stack(rows) if n.startswith("model.layers.") else rows[0] for n, rows in stacks.items()}


def stacked_name(name: str, period: int) -> str:
    """The stack that holds a parameter; other parameters than those of layers keep their name."""
    match = _LAYER.fullmatch(name)
    return f"model.layers.period.{int(match[1]) % period}.{match[2]}" if match else name


def name_at(path: tuple[Any, ...]) -> str:
    """The parameter's name from its place in a tree; an NNX variable adds attributes of its own below it."""
    return ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
