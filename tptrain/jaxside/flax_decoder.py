"""The decoder as Flax NNX modules over the parameters of a checkpoint, under the same names and layouts.

The mathematics is that of `tptrain.models.decoder`; the attribute path of a parameter is its Hugging Face
name. Nothing here knows devices: computation follows the sharding of the parameters and of the batch.

Shapes: B batch, T tokens, V vocab, A micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from tptrain.errors import Problem, nearest, raise_if_any
from tptrain.family import ModelFacts, parameter_table, stored_rows
from tptrain.jaxside.flax_layers import Body, Linear, Params, layer_list, soft_capped, under, widened


class FlaxDecoder(nnx.Module):
    """A causal language model.

    facts:  `tptrain.family.facts_from_config` of the model's config.json.
    params: Hugging Face name -> array, as Orbax restores `checkpoints/STEP/params`; matrices are [out, in].
            Every name that is missing, unknown or of another shape is listed in one ProblemsError.

    On a TPU, JAX multiplies float32 matrices in bfloat16 unless `jax_default_matmul_precision` forbids it.
    """

    def __init__(self, facts: ModelFacts, params: Params):
        check_params(facts, params)
        self.facts = facts
        self.model = Body(facts, under(params, "model"), layer_list(facts, under(params, "model.layers")))
        self.lm_head = None if facts.tie_word_embeddings else Linear(under(params, "lm_head"))

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Logits [B, T, V] in the format of the parameters; all inputs are integers [B, T].

        A token looks at itself and at earlier ones of its segment. Padding is a segment like any other.
        """
        return self._logits(self.model(tokens, positions, segment_ids))

    def with_router_loss(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Logits, and what the router adds to the training loss: see `Body.with_router_loss`."""
        x, of_router = self.model.with_router_loss(tokens, positions, segment_ids)
        return self._logits(x), of_router

    def _logits(self, x: jax.Array) -> jax.Array:
        scores = self.model.embed_tokens.scores(x) if self.lm_head is None else self.lm_head(x)
        return soft_capped(scores, self.facts.logit_soft_cap)

    def params(self) -> dict[str, jax.Array]:
        """Hugging Face name -> array as it is now: the tree that `FlaxDecoder` takes and checkpoints hold."""
        state = nnx.pure(nnx.state(self, nnx.Param))
        found = {".".join(map(str, path)): array for path, array in nnx.to_flat_state(state)}
        return {row.name: found[row.name] for row in stored_rows(parameter_table(self.facts))}


def loss(decoder: FlaxDecoder, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Mean negative log-likelihood over all counted tokens, a float32 (or wider) scalar.

    batch: tokens, targets, weights, positions, segment_ids, each [B, T] or [A, B, T]; a token counts as much
    as its weight. Micro-batches share one count, so [A, B, T] has the loss of its A x B rows in one batch.

    The router's loss is added where the model's config asks for one, as in training: of micro-batches their
    mean by counted tokens.
    """
    micro_batches = batch["tokens"].shape[0] if batch["tokens"].ndim == 3 else 1
    total = jnp.zeros(())
    for micro in range(micro_batches):
        part = {n: array[micro] if array.ndim == 3 else array for n, array in batch.items()}
        inputs = (part[name] for name in ("tokens", "positions", "segment_ids"))
        logits, of_router = decoder.with_router_loss(*inputs)
        total = total + loss_sum(logits, part["targets"], part["weights"])
        if of_router is not None:
            total = total + of_router * part["weights"].sum()
    return total / jnp.maximum(batch["weights"].sum(), 1.0)


def loss_sum(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over tokens of weight x negative log-likelihood, in float32 or wider.

    logits [B, T, V], targets [B, T] integers, weights [B, T]. The target's logit is selected by comparison,
    which stays local to each device when V is split.
    """
    logits = widened(logits)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    at_target = jnp.where(is_target, logits, 0.0).sum(-1)
    return ((jax.nn.logsumexp(logits, axis=-1) - at_target) * weights).sum()


def check_params(facts: ModelFacts, params: Params) -> None:
    """Raise ProblemsError with every parameter that is missing, misshapen or none of this model."""
    table = parameter_table(facts)
    wanted = {row.name: list(row.size) for row in stored_rows(table)}
    given = {name: _shape_or_type(value) for name, value in params.items()}
    missing = [name for name in wanted if name not in given]
    problems = []
    for name in missing:
        rule, fix = "is a parameter of this model", "the params of a checkpoint of this model"
        problems.append(Problem(f"params/{name}", "nothing", rule, f"shape {wanted[name]}", fix))
    for name in wanted:
        if name in given and given[name] != wanted[name]:
            rule, fix = "must have the shape that the model's config gives", f"shape {wanted[name]}"
            problems.append(Problem(f"params/{name}", given[name], rule, "matrices are [out, in]", fix))
    ties = {row.name: f"its data is that of {row.tied_to}" for row in table if row.tied_to}
    for name in sorted(set(given) - set(wanted)):
        rule = "is no parameter of this model"
        other = ties.get(name) or f"nearest that is missing: {nearest(name, missing) or 'none'}"
        problems.append(Problem(f"params/{name}", given[name], rule, other, "params without it"))
    raise_if_any(problems)


def _shape_or_type(value: object) -> object:
    """What can be said of a value: the shape of an array, the type of anything else."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else list(shape)
