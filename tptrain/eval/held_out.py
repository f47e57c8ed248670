"""Loss and token accuracy on held-out rows, by one compiled program without gradients.

The program sums over tokens, so that neither the size of a batch nor its padding has a part in the mean. It
has the shapes of a micro-batch of training and holds the logits of one chunk at a time, as training does: it
needs no more memory than a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tptrain.backends.base import TORCH_DTYPES, Backend, CompiledStep, StepFunction, Tensors
from tptrain.config.plan import Plan
from tptrain.config.schema import ScheduleSection
from tptrain.config.state_parts import PARAMS
from tptrain.data.batches import Batch, Batches
from tptrain.data.mixture import Sources
from tptrain.models.calling import call_method

# In the order of `Decoder.token_scores`.
_ROWS = ("tokens", "positions", "segment_ids", "targets", "weights")


@dataclass(frozen=True)
class RowTotals:
    """Sums over the counted tokens of some rows.

    loss_sum:       of the negative log-likelihoods, in nats; without a router's loss, which is no token's.
    counted_tokens: targets with weight. correct_tokens: those that are the likeliest token.
    """

    loss_sum: float = 0.0
    counted_tokens: int = 0
    correct_tokens: int = 0

    def __add__(self, other: RowTotals) -> RowTotals:
        return RowTotals(
            self.loss_sum + other.loss_sum,
            self.counted_tokens + other.counted_tokens,
            self.correct_tokens + other.correct_tokens,
        )


class RowScorer:
    """Scores any rows in the form of a `Batch`, packed ones too. One program for each shape of rows.

    Rows of a micro-batch must be split evenly by the mesh, and their length by the plan's chunks of the loss:
    both hold for a plan's own `micro_rows` and `data.seq_len`.
    """

    def __init__(self, plan: Plan, backend: Backend):
        self._backend = backend
        self._dtype = TORCH_DTYPES[plan.recipe.precision.compute]
        self._decoder = backend.decoder()
        self._constants = {n: backend.put_constant(t) for n, t in self._decoder.constants().items()}
        self._programs: dict[tuple[int, ...], CompiledStep] = {}

    def __call__(self, params: Tensors, batch: Batch) -> RowTotals:
        """The sums over all micro-batches of a batch. params: weights by buffer name, left as they are."""
        totals = RowTotals()
        for micro in range(batch.tokens.shape[0]):
            totals += self.fetch(self.start(params, batch, micro))
        return totals

    def start(self, params: Tensors, batch: Batch, micro: int = 0) -> Tensors:
        """Have the devices score one micro-batch; what it gives goes to `fetch`, which waits for them."""
        inputs, shape = self.inputs(params, batch, micro), batch.tokens.shape[1:]
        if shape not in self._programs:
            self._programs[shape] = self._backend.compile_step(self.function(), {}, inputs, {})
        return self._programs[shape]({}, inputs)[1]

    def fetch(self, outputs: Tensors) -> RowTotals:
        sums = self._backend.fetch_scalars(outputs)
        return RowTotals(sums["loss_sum"], round(sums["counted"]), round(sums["correct"]))

    def inputs(self, params: Tensors, batch: Batch, micro: int = 0) -> Tensors:
        """What the program reads: weights, the decoder's constants, and the rows of a micro-batch."""
        rows = self._backend.put_batch({name: getattr(batch, name)[micro] for name in _ROWS})
        weights = {f"{PARAMS}/{name}": tensor for name, tensor in params.items()}
        return {**weights, **self._constants, **rows}

    def function(self) -> StepFunction:
        """The program before it is compiled; it has no state."""
        prefix = f"{PARAMS}/"

        def score_rows(state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
            weights = {
                n.removeprefix(prefix): t.to(self._dtype) for n, t in inputs.items() if n.startswith(prefix)
            }
            modules = {**weights, **{name: inputs[name] for name in self._constants}}
            with torch.no_grad():
                arguments = tuple(inputs[name] for name in _ROWS)
                loss_sum, correct = call_method(self._decoder, "token_scores", modules, arguments)
            # Sums of ones in float32 are exact up to 2^24 tokens.
            return state, {"loss_sum": loss_sum, "counted": inputs["weights"].sum(), "correct": correct}

        return score_rows


@dataclass(frozen=True)
class HeldOutScore:
    """loss: mean over the counted tokens of all held-out rows, in nats, as transformers reports it without a
    router's loss. token_accuracy: the part of them that are the likeliest token."""

    loss: float
    token_accuracy: float
    counted_tokens: int


class HeldOut:
    """Scores the same rows whenever it is called; compiled at the first call."""

    def __init__(self, plan: Plan, scorer: RowScorer, rows: Sources):
        """rows: held-out rows of at most data.seq_len tokens, of which one counts at least.

        They are batched as those of one epoch of training, and share rows where training packs; but in
        micro-batches, of which the last one is filled up with empty rows.
        """
        section = replace(plan.recipe.data, batch_rows=plan.micro_rows, mix="concat")
        self._batches = Batches.of_run(rows, section, 1, ScheduleSection(epochs=1))
        self._scorer = scorer

    def __call__(self, params: Tensors) -> HeldOutScore:
        """params: weights by buffer name, left as they are."""
        totals, waiting, batches = RowTotals(), list[Tensors](), self._batches
        for cursor in range(0, batches.num_samples, batches.batch_rows):
            waiting.append(self._scorer.start(params, batches.batch_at(cursor)))
            # One batch is under way while the next is made; more would pile up on the devices.
            if len(waiting) > 1:
                totals += self._scorer.fetch(waiting.pop(0))
        for outputs in waiting:
            totals += self._scorer.fetch(outputs)
        counted = totals.counted_tokens
        assert counted, "held-out rows count at least one token"
        return HeldOutScore(totals.loss_sum / counted, totals.correct_tokens / counted, counted)
