"""A small model of every family, shaped so that each of its features moves the logits.

Windows are shorter than the rows, soft caps are within reach of scores and logits, depths end inside of a
period, and no two sizes of a config are equal.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests import small
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config import Plan
from tptrain.family import families
from tptrain.train.schedule import learning_rate
from tptrain.train.state import fresh_state
from tptrain.train.step import make_train_step

WINDOW = 7
LOSS_STEPS = 20
_SIZES: dict[str, Any] = {
    "vocab_size": small.VOCAB,
    "hidden_size": 136,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_parameters": small.ROPES["llama3"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GEMMA: dict[str, Any] = {
    "tie_word_embeddings": True,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 21,
    "final_logit_softcapping": 4.0,
}

# Name of a case -> config.json, in the spelling of transformers 5.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES},
    "qwen2": {
        "model_type": "qwen2",
        **_SIZES,
        **{"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    },
    "qwen3": {"model_type": "qwen3", **_SIZES, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": WINDOW},
    "gemma2": {
        "model_type": "gemma2",
        **_SIZES,
        **_GEMMA,
        **{"num_hidden_layers": 5, "attn_logit_softcapping": 1.5},
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_SIZES,
        **_GEMMA,
        # Published ones have a full layer after five others; the tables of these are tested as they are.
        **{"num_hidden_layers": 5, "sliding_window_pattern": 3},
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "olmo2": {"model_type": "olmo2", **_SIZES},
    "mixtral": {
        "model_type": "mixtral",
        **_SIZES,
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        **{"output_router_logits": True, "router_aux_loss_coef": 0.7},
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SIZES,
        **{"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "mlp_only_layers": [1]},
        **{"norm_topk_prob": False, "router_aux_loss_coef": 0.7},
    },
}
for _name, _config in CONFIGS.items():
    _config["architectures"] = [families()[_config["model_type"]].architecture]

# Changes in the models that vLLM serves: its kernels take heads of 32 and more, and its Qwen2 no windows.
_SERVED: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 160}


def served_config(name: str) -> dict[str, Any]:
    # vLLM's Qwen2 takes the hidden size over the heads for the size of a head.
    qwen2 = {"use_sliding_window": False, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {**CONFIGS[name], **_SERVED, **(qwen2 if name == "qwen2" else {})}


@cache
def model_of(name: str) -> Any:
    """transformers' model of a case, in float32 with eager attention and every tensor random."""
    return small.reference_model(CONFIGS[name])


def masks_of(model: Any, rows: small.Rows) -> Any:
    """The masks of segments, causality and windows as transformers' model takes them."""
    ids = torch.from_numpy(rows.segment_ids)
    steps = torch.arange(ids.shape[1])
    back = steps[:, None] - steps[None, :]
    allowed = (back >= 0) & (ids[:, :, None] == ids[:, None, :])
    window = getattr(model.config, "sliding_window", None)
    near = allowed if window is None else allowed & (back < window)
    full, sliding = (
        torch.where(each, 0.0, torch.finfo(torch.float32).min)[:, None] for each in (allowed, near)
    )
    if getattr(model.config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding


def outputs_of(model: Any, rows: small.Rows) -> tuple[torch.Tensor, torch.Tensor | float]:
    """transformers' logits [B, T, V], and its router loss over the real tokens with its coefficient."""
    tokens, positions, _ = (tensor.long() for tensor in rows.tensors())
    masks, config = masks_of(model, rows), model.config
    wanted = getattr(config, "output_router_logits", False)
    given = {"input_ids": tokens, "position_ids": positions, "attention_mask": masks}
    if not wanted:
        return model(**given).logits, 0.0
    # Around its own forward, which takes the router loss of padded batches only.
    result = model.model(**given, output_router_logits=True)
    loss = load_balancing_loss_func(
        result.router_logits, config.num_local_experts, config.num_experts_per_tok, real(rows)
    )
    return model.lm_head(result.last_hidden_state), config.router_aux_loss_coef * loss


def reference_logits(model: Any, rows: small.Rows) -> torch.Tensor:
    """transformers' logits [B, T, V], which are wide enough to show a fault."""
    with torch.no_grad():
        logits, _ = outputs_of(model, rows)
    spread = logits[torch.from_numpy(rows.real)].std().item()
    assert spread >= 1, f"logits have a standard deviation of {spread}: too small to show a fault"
    return logits


def real(rows: small.Rows) -> torch.Tensor:
    return torch.from_numpy(np.asarray(rows.real))


def training_plan(name: str) -> Plan:
    """What both sides of a comparison of losses train by.

    AdamW divides the smallest gradients by their own size: with its usual epsilon their rounding alone, which
    differs from machine to machine, moves the losses by 1e-4 in twenty steps.
    """
    return small.torch_plan(config=CONFIGS[name], optim={"clip_norm": 1.0, "eps": 1e-5})


def our_losses(name: str) -> list[float]:
    """Losses of LOSS_STEPS steps of the torch backend from the weights of a case."""
    plan = training_plan(name)
    backend = TorchBackend(plan)
    decoder = backend.decoder()
    weights = {n: tensor.clone() for n, tensor in small.weights_of(model_of(name)).items()}
    state = fresh_state(backend, small.DictSource(weights))
    step, losses = make_train_step(decoder, backend.layout, plan.recipe), []
    for number in range(1, LOSS_STEPS + 1):
        state, outputs = step(state, small.step_inputs(backend, plan, decoder.constants(), number))
        losses.append(outputs["loss"].item())
    return losses


def transformers_losses(name: str, router_part: float = 1.0, steps: int = LOSS_STEPS) -> list[float]:
    """The same of transformers' model by autograd and torch's AdamW. router_part: of the router's loss."""
    model, recipe = small.reference_model(CONFIGS[name]), training_plan(name).recipe
    parameters, optim = dict(model.named_parameters()), recipe.optim
    groups = [
        {"params": [p for p in parameters.values() if (p.ndim > 1) == decays], "weight_decay": decay}
        for decays, decay in ((True, optim.weight_decay), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    losses = []
    for number in range(1, steps + 1):
        batch = {n: torch.from_numpy(array[0]) for n, array in small.train_batch(number % 2).items()}
        rows = small.Rows(*(batch[n].numpy() for n in ("tokens", "positions", "segment_ids")))
        logits, router_loss = outputs_of(model, rows)
        targets, weights = batch["targets"].flatten().long(), batch["weights"].flatten()
        likelihood = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        loss = (likelihood * weights).sum() / weights.sum() + router_part * router_loss
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), optim.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(number, small.PLANNED_STEPS, recipe.schedule, optim)
        adamw.step()
        losses.append(loss.item())
    return losses
