"""The Flax decoder with its layers as `lax.scan`s over stacked parameters, as large models train.

Layers that repeat are one loop each (`tptrain.family.layer_runs`, which also names the stacks); a stack has a
leading layer dim. All else is `FlaxDecoder`'s.

Shapes: L layers, B batch, T tokens, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tptrain.config.remat import KEPT
from tptrain.family import LayerRun, LayerRuns, ModelFacts, layer_runs, parameter_table, stored_rows
from tptrain.jaxside.flax_decoder import check_params
from tptrain.jaxside.flax_layers import (
    Block,
    Body,
    CoreFactory,
    LayerContext,
    LayerResult,
    Linear,
    Mark,
    Params,
    PlainAttention,
    under,
    unmarked,
)
from tptrain.jaxside.flax_loss import LossChunks, chunked_loss


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


class ScannedRun(nnx.Module):
    """A run of layers as one loop. prefix: what the names of its stacks begin with, `model.layers.`."""

    def __init__(self, facts: ModelFacts, run: LayerRun, prefix: str, params: Params, passes: Passes):
        kinds = [facts.layer_kinds[layer] for layer in run.layers[: run.period]]
        self.period = nnx.List(
            Block(facts, kind, under(params, f"{prefix}period.{i}")) for i, kind in enumerate(kinds)
        )
        self.passes, self.prefix = passes, prefix

    def __call__(self, x: jax.Array, context: LayerContext) -> LayerResult:
        graph, stacked = nnx.split(self.period)

        def one_period(x: jax.Array, layer: Any) -> tuple[jax.Array, list[jax.Array]]:
            sums: list[jax.Array] = []
            for block in nnx.merge(graph, jax.tree_util.tree_map_with_path(self._held, layer)):
                x, more = block(x, context)
                sums += more
            return x, sums

        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[self.passes.remat])
        if self.passes.remat != "none":
            # The loop itself keeps XLA from joining a layer with its repetition.
            one_period = jax.checkpoint(one_period, policy=policy, prevent_cse=False)
        return LayerResult(*jax.lax.scan(one_period, x, stacked))

    def _held(self, path: tuple[Any, ...], array: jax.Array) -> jax.Array:
        return self.passes.hold(f"{self.prefix}period.{name_at(path)}", array)


class ScannedLayers(nnx.Module):
    """The layers as one loop per run; stands where the list of layers stands."""

    def __init__(self, facts: ModelFacts, params: Params, passes: Passes):
        cut = runs_of(facts)
        self.runs = nnx.List(
            ScannedRun(facts, run, cut.prefix(i), params, passes) for i, run in enumerate(cut.runs)
        )

    def __call__(self, x: jax.Array, context: LayerContext) -> LayerResult:
        sums: list[jax.Array] = []
        for run in self.runs:
            x, more = run(x, context)
            sums += more
        return LayerResult(x, sums)


class ScannedDecoder(nnx.Module):
    """A causal language model. params: as `stack_layers` gives them."""

    def __init__(self, facts: ModelFacts, params: Params, passes: Passes):
        layers = ScannedLayers(facts, params, passes)
        self.model = Body(facts, under(params, "model"), layers, passes.attention, passes.mark)
        self.lm_head = None if facts.tie_word_embeddings else Linear(under(params, "lm_head"))
        self.passes = passes

    def mean_loss(self, batch: Mapping[str, jax.Array], chunks: LossChunks) -> jax.Array:
        """Mean negative log-likelihood over the counted tokens, a float32 (or wider) scalar.

        The router's loss is added to it where the model's config asks for one, as in training.

        batch: tokens, targets, weights, positions, segment_ids, each [B, T].
        """
        inputs = (batch[name] for name in ("tokens", "positions", "segment_ids"))
        hidden, of_router = self.model.with_router_loss(*inputs)
        head = (self.lm_head or self.model.embed_tokens).weight[...]
        total = jnp.maximum(batch["weights"].sum(), 1.0)
        cap = self.model.facts.logit_soft_cap
        loss = chunked_loss(
            hidden, head, batch["targets"], batch["weights"], total, chunks, self.passes.mark, cap
        )
        return loss if of_router is None else loss + of_router * (batch["weights"].sum() / total)


def stack_layers(facts: ModelFacts, params: Params) -> dict[str, jax.Array]:
    """The parameters of a checkpoint, those of layers stacked. Raises ProblemsError as `FlaxDecoder` does."""
    check_params(facts, params)
    cut = runs_of(facts)
    stacks: dict[str, list[jax.Array]] = {}
    for row in stored_rows(parameter_table(facts)):
        stacks.setdefault(cut.stack_of(row.name) or row.name, []).append(params[row.name])
    return {n: jnp.stack(rows) if n.startswith("model.layers.") else rows[0] for n, rows in stacks.items()}


def runs_of(facts: ModelFacts) -> LayerRuns:
    """The loops over the layers of a model of which all weights are trained."""
    return layer_runs(stored_rows(parameter_table(facts)), facts.layer_kinds)


def name_at(path: tuple[Any, ...]) -> str:
    """The parameter's name from its place in a tree; an NNX variable adds attributes of its own below it."""
    return ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
