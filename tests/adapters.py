"""PEFT's LoRA over transformers' models: what training with adapters is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tests import small
from tptrain.backends.base import Tensors
from tptrain.config import Plan

_PREFIX = "base_model.model."


def rounded(model: Any) -> Any:
    """The model with every weight rounded to bfloat16, as a base is held; it stays in float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


def random_adapters(plan: Plan, begun: bool = True) -> Tensors:
    """Row name -> values for all adapters of a plan.

    begun: B is not zero, so that each takes part in the logits; else it is, as in a run's first step.
    """
    generator = torch.Generator().manual_seed(5)
    rows = [row for row in plan.table if row.is_adapter]
    values = {row.name: small.WEIGHT_STD * torch.randn(row.size, generator=generator) for row in rows}
    return {name: tensor * (begun or "lora_B" not in name) for name, tensor in values.items()}


def weights_of(model: Any, plan: Plan, adapters: Mapping[str, torch.Tensor]) -> small.DictSource:
    """A source of the weights of transformers' model and of adapters."""
    return small.DictSource({**small.weights_of(model), **adapters})


def peft_model(model: Any, plan: Plan, adapters: Mapping[str, torch.Tensor], modules: Iterable[str]) -> Any:
    """PEFT's model over transformers', with these adapters on the named modules."""
    from peft import LoraConfig, get_peft_model  # which takes seconds, and which not every test needs

    lora = plan.recipe.lora
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(modules), lora_dropout=0.0, bias="none"
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    theirs = adapter_parameters(wrapped)
    assert set(theirs) == set(adapters)
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(adapters[name])
    return wrapped


def adapter_parameters(wrapped: Any) -> dict[str, torch.nn.Parameter]:
    """Row name -> parameter of all adapters of PEFT's model."""
    return {
        name.removeprefix(_PREFIX).replace(".default.", "."): parameter
        for name, parameter in wrapped.named_parameters()
        if ".lora_" in name
    }
