"""The optimizer of a recipe in optax, so that a Flax loop updates a model as a run of tptrain does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tptrain.config import OptimSection
from tptrain.errors import refuse
from tptrain.family import ModelFacts, parameter_table
from tptrain.jaxside.flax_scan import name_at, runs_of


def make_optimizer(
    optim: OptimSection, rate: optax.ScalarOrSchedule, facts: ModelFacts
) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, with weight decay on matrices alone, as in
    `tptrain.train.optimizers`.

    Unlike there, an update that is not finite is applied. Only AdamW with moments in float32 is known here;
    anything else raises ProblemsError.

    rate:  the learning rate, or a function from the number of updates made so far (0 at the first step).
           `learning_rate` and `accumulation` of `optim` are not read.
    facts: of the model, whose parameter table says what decays. The tree may be the state of a FlaxDecoder
           or the flat dict of names, also with layers stacked (`tptrain.jaxside.flax_scan`).
    """
    _require_plain_adamw(optim)
    table, cut = parameter_table(facts), runs_of(facts)
    decays = {name: row.decay for row in table for name in (row.name, cut.stack_of(row.name) or row.name)}

    def decay_mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decays[name_at(path)], params)

    adamw = optax.adamw(
        rate, optim.beta1, optim.beta2, optim.eps, weight_decay=optim.weight_decay, mask=decay_mask
    )
    return optax.chain(clip_by_global_norm(optim.clip_norm), adamw) if optim.clip_norm else adamw


def _require_plain_adamw(optim: OptimSection) -> None:
    for setting, value, known in (
        ("optim.name", optim.name, "adamw"),
        ("optim.moments_dtype", optim.moments_dtype, "float32"),
    ):
        if value != known:
            raise refuse(setting, value, "has no counterpart in the Flax loop", f"known: {known}", known)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Gradients scaled to a norm of at most `limit`.

    With the 1e-6 of torch.nn.utils.clip_grad_norm_, which optax's own clipping lacks: updates would differ
    from tptrain's by a millionth.
    """

    def clip(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        scale = jnp.minimum(limit / (optax.tree.norm(updates) + 1e-6), 1.0)
        return jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), updates)

    return optax.stateless(clip)
