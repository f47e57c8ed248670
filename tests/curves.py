"""An independent trainer: plain transformers and torch.optim.AdamW on the batches of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tptrain.config.plan import Plan
from tptrain.data.batches import Batches
from tptrain.data.dataset import tokenize_records
from tptrain.data.sources import load_records
from tptrain.data.tokenizer import load_tokenizer
from tptrain.train.journal import read_journal


def reference_losses(plan: Plan, steps: int, total_steps: int) -> list[float]:
    """Losses of the first `steps` steps; the model is the plan's `model.pretrained`, in float32.

    Written with what transformers and torch offer, sharing nothing with tptrain but the batches. The learning
    rate (linear warm-up, then cosine to 0) comes from transformers too.
    """
    from transformers import get_cosine_schedule_with_warmup

    recipe = plan.recipe
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.pretrained, dtype=torch.float32, attn_implementation="eager"
    )
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (recipe.optim.beta1, recipe.optim.beta2)
    optimizer = torch.optim.AdamW(groups, lr=recipe.optim.learning_rate, betas=betas, eps=recipe.optim.eps)
    rates = get_cosine_schedule_with_warmup(optimizer, recipe.schedule.warmup_steps, total_steps)
    losses, batches = [], run_batches(plan)
    for step in range(steps):
        # transformers counts steps from 0 and would start at a rate of 0; tptrain counts from 1.
        rates.step()
        losses.append(_step(model, optimizer, batches, step, recipe.optim.clip_norm))
    return losses


def _step(model, optimizer, batches: Batches, step: int, clip_norm: float) -> float:
    batch = batches.batch_at(step * batches.batch_rows)
    tokens, targets, weights, real = (
        torch.from_numpy(a.reshape(-1, a.shape[-1])).long()
        for a in (batch.tokens, batch.targets, batch.weights, batch.segment_ids)
    )
    logits = model(tokens, attention_mask=real).logits
    labels = targets.masked_fill(weights == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


def run_batches(plan: Plan) -> Batches:
    """The batches of a run, made again from its recipe."""
    data = plan.recipe.data
    records = load_records(data.path, data.subset, data.split, data.max_records)
    dataset, _ = tokenize_records(records, load_tokenizer(plan.recipe.model), data)
    return Batches(dataset, data, plan.recipe.optim.accumulation, None)


def journal_losses(run: Path) -> list[float]:
    return [record.loss for record in read_journal(run / "journal.jsonl")]
