"""The train step of a plan as a JAX trainer writes it: Flax, optax, one jit over a mesh with a donated state.

The model is `tptrain.jaxside.flax_scan`; what tptrain's own step is given, this one is given too: the same
mesh, specs, remat policy, kernel, chunks of the loss and formats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from tptrain.backends.base import Buffer, Layout
from tptrain.config.plan import Plan
from tptrain.config.remat import OFFLOADED
from tptrain.config.state_parts import PARAMS
from tptrain.errors import refuse
from tptrain.jaxside.flax_loss import LossChunks
from tptrain.jaxside.flax_scan import Passes, ScannedDecoder, name_at
from tptrain.jaxside.flax_sharding import MeshRules
from tptrain.jaxside.flax_train import make_optimizer
from tptrain.jaxside.lowering import Platform
from tptrain.jaxside.specs import named_sharding
from tptrain.mesh import spec_of
from tptrain.train.step import BATCH_DTYPES

Arrays = dict[str, jax.Array]
# `params`: stacked weights by buffer name. `optimizer`: the state of optax.
State = dict[str, Any]
_RATE = "learning_rate"
_BATCH_DIMS = ("act_batch", "act_tokens")


class FlaxStep:
    """The step of a plan on a mesh; one micro-batch, the whole model trained by AdamW."""

    def __init__(self, plan: Plan, mesh: Mesh, platform: Platform = "tpu"):
        _require_same(plan)
        self.plan, self.mesh = plan, mesh
        layout = Layout.stacked(plan.table, plan.specs, plan.layer_runs)
        self.buffers: dict[str, Buffer] = layout.buffers
        stacks = {name: buffer.row_spec for name, buffer in self.buffers.items()}
        rules = MeshRules(mesh, plan.rules.acts, stacks, plan.splash, platform)
        self._passes: Passes = rules.passes(plan.recipe.remat.policy)
        self._chunks = LossChunks(plan.loss_chunk_tokens, plan.batch_shards)

    def step(self, state: State, inputs: Arrays) -> tuple[State, Arrays]:
        """One step. inputs: the batch [1, B, T] and the learning rate."""
        recipe, params = self.plan.recipe, state[PARAMS]
        compute = jnp.dtype(recipe.precision.compute)
        batch = {name: inputs[name][0] for name in BATCH_DTYPES}

        def loss(working: Arrays) -> jax.Array:
            return ScannedDecoder(self.plan.facts, working, self._passes).mean_loss(batch, self._chunks)

        # Cast once and before the loop, so that what devices exchange is in the compute format.
        value, gradients = jax.value_and_grad(loss)({n: p.astype(compute) for n, p in params.items()})
        gradients = {name: g.astype(params[name].dtype) for name, g in gradients.items()}
        updates, optimizer = self._optimizer(inputs[_RATE]).update(gradients, state["optimizer"], params)
        outputs = {"loss": value, "grad_norm": optax.tree.norm(gradients)}
        return {PARAMS: optax.apply_updates(params, updates), "optimizer": optimizer}, outputs

    def _optimizer(self, rate: jax.Array | float) -> optax.GradientTransformation:
        return make_optimizer(self.plan.recipe.optim, rate, self.plan.facts)

    def first_state(self, params: Arrays) -> State:
        return {PARAMS: params, "optimizer": self._optimizer(0.0).init(params)}

    def jitted(self, *, donate: bool = True) -> Callable[[State, Arrays], tuple[State, Arrays]]:
        """The step as one program, which may write the new state over the old one where it is donated."""
        state, inputs = self.shapes()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, inputs))
        return jax.jit(
            self.step,
            donate_argnums=(0,) if donate else (),
            in_shardings=shardings,
            out_shardings=(shardings[0], None),
            keep_unused=True,
        )

    def shapes(self) -> tuple[State, Any]:
        """State and inputs as shapes with shardings."""
        master = jnp.dtype(self.plan.recipe.precision.master)
        params = {n: jax.ShapeDtypeStruct(b.shape, master) for n, b in self.buffers.items()}
        bare = jax.eval_shape(self.first_state, params)
        state = jax.tree_util.tree_map_with_path(self._placed, bare)
        shape = (1, self.plan.micro_rows, self.plan.recipe.data.seq_len)
        rows = named_sharding(self.mesh, ((), *spec_of(_BATCH_DIMS, self.plan.rules.acts)))
        inputs = {n: jax.ShapeDtypeStruct(shape, t, sharding=rows) for n, t in BATCH_DTYPES.items()}
        whole = named_sharding(self.mesh, ())
        return state, {**inputs, _RATE: jax.ShapeDtypeStruct((), master, sharding=whole)}

    def _placed(self, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """A leaf of the state with its sharding: weights and moments by their buffer, counters replicated."""
        buffer = self.buffers.get(name_at(path).removeprefix(f"{PARAMS}.").removeprefix("optimizer."))
        sharding: NamedSharding = named_sharding(self.mesh, buffer.spec if buffer else ())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same(plan: Plan) -> None:
    """Refuse what the Flax side would leave out."""
    optim, vocab = plan.recipe.optim, plan.facts.vocab_size
    if optim.accumulation != 1:
        raise refuse("optim.accumulation", optim.accumulation, "is not known to the Flax step", "one", "1")
    if plan.recipe.remat.policy in OFFLOADED:
        rule, other = "offloads, which the Flax step does not", "policies that keep all on the device"
        raise refuse("remat.policy", plan.recipe.remat.policy, rule, other, "full or attention")
    if plan.padded_vocab != vocab:
        rule, other = "must divide the vocabulary for the Flax step", f"vocab_size={vocab}"
        raise refuse("mesh.tensor", plan.mesh.axis_sizes["tensor"], rule, other, "1")
    if not all(row.trainable for row in plan.table):
        patterns = plan.recipe.model.trainable
        raise refuse("model.trainable", patterns, "is not known to the Flax step", "all weights", "*")
