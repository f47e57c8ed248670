"""Token-weighted cross-entropy, with the logits of one chunk of tokens at a time.

The logits of all tokens would be the largest tensor of a training step. What a token weighs in the loss is
known beforehand, so the gradients with respect to hidden states and head follow as soon as the logits of a
chunk are there, and these can be forgotten: three matrix products in all, as many as autograd takes for the
plain loss.

Shapes: B rows, T tokens, D model, V vocab, S batch shards, P chunks, N tokens of one chunk in one shard
(B / S x T / P).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tptrain.models.marks import Marks

Parts = tuple[torch.Tensor, ...]
# (carry, one part of each) -> (carry, a result)
LoopBody = Callable[[Parts, Parts], tuple[Parts, torch.Tensor]]
# (body, carry, tensors with a leading dim of parts) -> (carry, the results stacked)
Loop = Callable[[LoopBody, Parts, Parts], tuple[Parts, torch.Tensor]]


def python_loop(body: LoopBody, carry: Parts, parts: Parts) -> tuple[Parts, torch.Tensor]:
    """The loop as it is written."""
    results = []
    for one in zip(*parts, strict=True):
        carry, result = body(carry, one)
        results.append(result)
    return carry, torch.stack(results)


@dataclass(frozen=True)
class Projection:
    """The way from hidden states to logits.

    logits:   (hidden states [S, N, D], head weight [V, D]) -> logits [S, N, V].
    soft_cap: the logits are those of the product under this cap; None for no cap.
    """

    logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    soft_cap: float | None = None

    def product_gradient(self, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the product below the cap, from the logits above it and their gradient."""
        if self.soft_cap is None:
            return gradient
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Logits of a padded vocabulary lie far beyond the cap; their gradient is 0.
        share = (wide / self.soft_cap).clamp(-1, 1)
        return (gradient * (1 - share * share)).to(gradient.dtype)


@dataclass(frozen=True)
class LossChunks:
    """How the loss walks over a batch.

    tokens: tokens of every row at a time; it divides the row.
    shards: parts of the rows that different devices hold. The head's gradient is added up within each of them
            chunk by chunk, and over them a single time, so devices exchange it once.
    loop:   runs the chunks where there are several; a backend may put a scan in its place.
    """

    tokens: int
    shards: int = 1
    loop: Loop = python_loop


def mean_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    total: torch.Tensor,
    project: Projection,
    marks: Marks,
    chunks: LossChunks,
) -> torch.Tensor:
    """Sum over tokens of weight x negative log-likelihood, over `total`; in float32 or wider.

    hidden [B, T, D], head [V, D], targets [B, T] integers, weights [B, T], total a scalar without gradient.
    project, marks: the decoder's way to logits, and its marks.
    """
    loss: torch.Tensor = _ChunkedLoss.apply(hidden, head, targets, weights, total, project, marks, chunks)
    return loss


def token_scores(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    project: Projection,
    marks: Marks,
    chunks: LossChunks,
) -> torch.Tensor:
    """[2]: sums over tokens of weight x negative log-likelihood, and of weight where the target is the
    likeliest token. Without gradients; arguments and format as in `mean_loss`.

    The logits of one chunk are held at a time, and nothing else that has V.
    """

    def body(carry: Parts, parts: Parts) -> tuple[Parts, torch.Tensor]:
        x, targets, weights = parts
        x = marks(x, "chunk", "act_batch", "act_tokens", "act_embed")
        logits = project.logits(x, carry[0])
        return carry, torch.stack(_likelihood_and_hits(logits, targets, weights))

    # Whole on every device that holds a part of V, before the loop, as in training.
    head = marks(head * 1, "head", "act_vocab", "act_embed")
    cut = [_cut(t, chunks) for t in (hidden, targets, weights)]
    if len(cut[0]) == 1:
        return body((head,), tuple(t[0] for t in cut))[1]
    return chunks.loop(body, (head,), tuple(cut))[1].sum(0)


def _likelihood_and_hits(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sums of `token_scores` over all tokens of logits [..., V].

    A target is the likeliest token where no logit is above its own, and no equal one has a lower id: what
    argmax finds, in a form to which each device that holds a part of V contributes by itself.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = torch.arange(wide.shape[-1], dtype=targets.dtype, device=wide.device)
    at_target = torch.where(ids == targets[..., None], wide, 0.0).sum(-1, keepdim=True)
    # Stated by what is behind: of logits that are NaN no one is.
    behind = (wide < at_target) | ((wide == at_target) & (ids >= targets[..., None]))
    is_likeliest = ((~behind).to(wide.dtype).sum(-1) == 0).to(wide.dtype)
    likelihood = wide.logsumexp(-1) - at_target[..., 0]
    wide_weights = weights.to(wide.dtype)
    return (likelihood * wide_weights).sum(), (is_likeliest * wide_weights).sum()


class _ChunkedLoss(torch.autograd.Function):
    """The loss, with gradients that are ready before the backward pass asks for them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        total: torch.Tensor,
        project: Projection,
        marks: Marks,
        chunks: LossChunks,
    ) -> torch.Tensor:
        trained = ctx.needs_input_grad[1]

        def body(carry: Parts, parts: Parts) -> tuple[Parts, torch.Tensor]:
            loss, grad_head, head, total = carry
            more_loss, more_grad_head, grad_x = _one_chunk(parts, head, total, project, marks, trained)
            return (loss + more_loss, grad_head + more_grad_head, head, total), grad_x

        # Whole on every device that holds a part of V, before the loop. A product, because the sharding of a
        # tensor that is an argument of the traced program cannot be stated anew.
        head = marks(head * 1, "head", "act_vocab", "act_embed")
        cut = [_cut(t, chunks) for t in (hidden, targets, weights)]
        if len(cut[0]) == 1:
            first = tuple(t[0] for t in cut)
            loss, grad_head, grad_x = _one_chunk(first, head, total, project, marks, trained)
            grads = grad_x[None]
        else:
            loss, grad_head = _nothing(head, chunks.shards if trained else None, marks)
            (loss, grad_head, *_), grads = chunks.loop(body, (loss, grad_head, head, total), tuple(cut))
        grad_hidden = _uncut(grads, hidden.shape)
        grad_hidden = marks(grad_hidden, "grad_hidden", "act_batch", "act_tokens", "act_embed")
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype).sum(0) if trained else grad_head)
        return loss / total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        grad_hidden, grad_head = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        return gradient * grad_hidden, gradient * grad_head if trained else None, *[None] * 6


def _one_chunk(
    parts: Parts,
    head: torch.Tensor,
    total: torch.Tensor,
    project: Projection,
    marks: Marks,
    trained: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the loss, gradient of the head within each shard [S, V, D], gradient of the hidden states.

    parts: hidden states [S, N, D], targets and weights [S, N]. The gradients are those of the sum / total;
    the head's is in float32 or wider, to be added up, and a scalar 0 where the head is not `trained`.
    """
    x, targets, weights = parts
    x = marks(x, "chunk", "act_batch", "act_tokens", "act_embed")
    logits = project.logits(x, head)
    loss, gradient = loss_and_gradient(logits, targets, weights, total)
    gradient = project.product_gradient(logits, gradient)
    gradient = marks(gradient, "grad_logits", "act_batch", "act_tokens", "act_vocab")
    grad_x = marks(gradient @ head, "grad_chunk", "act_batch", "act_tokens", "act_embed")
    if not trained:
        return loss, torch.zeros_like(loss), grad_x
    grad_head = marks(gradient.mT @ x, "grad_head", "act_batch", "act_vocab", "act_embed")
    return loss, grad_head.to(loss.dtype), grad_x


def _nothing(head: torch.Tensor, shards: int | None, marks: Marks) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first chunk is added to: a loss of 0, and a gradient of 0 of the head within each shard.

    shards: None where the head is not trained.
    """
    wide = torch.promote_types(head.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=head.device)
    if shards is None:
        return loss, torch.zeros_like(loss)
    grad_head = torch.zeros((shards, *head.shape), dtype=wide, device=head.device)
    return loss, marks(grad_head, "grad_head", "act_batch", "act_vocab", "act_embed")


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over tokens of weight x negative log-likelihood, and the gradient of that sum / total.

    logits [..., V] -> a scalar in float32 or wider, and a tensor like logits. The target is found by
    comparison instead of a gather: with V split over devices, each one contributes its part and nothing is
    collected.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_target = torch.arange(wide.shape[-1], dtype=targets.dtype, device=wide.device) == targets[..., None]
    log_sum = wide.logsumexp(-1, keepdim=True)
    at_target = torch.where(is_target, wide, 0.0).sum(-1)
    loss = ((log_sum[..., 0] - at_target) * weights).sum()
    share = weights.to(wide.dtype) / total
    gradient = ((wide - log_sum).exp() - is_target.to(wide.dtype)) * share[..., None]
    return loss, gradient.to(logits.dtype)


def _cut(x: torch.Tensor, chunks: LossChunks) -> torch.Tensor:
    """[B, T, ...] -> [P, S, N, ...]: the same tokens of all rows of a shard lie together."""
    assert x.shape[1] % chunks.tokens == 0, "chunks divide the row"
    apart = x.unflatten(1, (-1, chunks.tokens)).unflatten(0, (chunks.shards, -1))
    return apart.movedim(2, 0).flatten(2, 3)


def _uncut(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `_cut`, for a tensor that had this shape."""
    parts, shards, _, width = x.shape
    apart = x.reshape(parts, shards, shape[0] // shards, -1, width)
    return apart.movedim(0, 2).reshape(shape)
