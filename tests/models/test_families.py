"""Every family computes what transformers computes; with any of its features broken, the difference shows."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch.func import functional_call

from tests import families, small
from tptrain.backends.base import Tensors
from tptrain.family import LayerKind, ModelFacts, RopeFacts, facts_from_config
from tptrain.family.facts import ExpertFacts
from tptrain.models.attention import KVCache
from tptrain.models.decoder import Decoder

LOGITS, BROKEN, LOSSES = 1e-5, 1e-3, 1e-4
ROWS = {"padded": small.padded_rows(), "packed": small.packed_rows()}


@cache
def theirs(name: str, rows: str) -> torch.Tensor:
    return families.reference_logits(families.model_of(name), ROWS[rows])


def decoder_of(facts: ModelFacts) -> Decoder:
    with torch.device("meta"):
        return Decoder(facts)


def gap(name: str, rows: str, facts: ModelFacts, weights: Tensors) -> float:
    """How far our logits are from transformers' at the real positions, relative to the largest one."""
    model, real = decoder_of(facts), families.real(ROWS[rows])
    known = dict(model.named_parameters())
    kept = {n: tensor for n, tensor in weights.items() if n in known}
    with torch.no_grad():
        ours = functional_call(model, {**kept, **model.constants()}, ROWS[rows].tensors())
    return small.difference(ours[real], theirs(name, rows)[real])


def facts_of(name: str, **changes: Any) -> ModelFacts:
    return dataclasses.replace(facts_from_config(families.CONFIGS[name]), **changes)


def weights_of(name: str) -> Tensors:
    return small.weights_of(families.model_of(name))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", families.CONFIGS)
def test_logits_equal_transformers(name: str, rows: str) -> None:
    assert gap(name, rows, facts_of(name), weights_of(name)) <= LOGITS


@pytest.mark.parametrize("name", families.CONFIGS)
def test_the_config_that_transformers_writes_is_the_same_model(name: str) -> None:
    assert facts_from_config(families.model_of(name).config.to_dict()) == facts_of(name)


_WIDER = LayerKind(families.WINDOW + 1)
_NARROW = LayerKind(families.WINDOW)
_UNSCALED = RopeFacts("default", 10000.0)


def _experts(name: str, **changes: Any) -> ExpertFacts:
    experts = facts_of(name).experts
    assert experts is not None
    return dataclasses.replace(experts, **changes)


# What a case is told wrongly. Weights that the wrong model lacks are left out.
MUTATIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope": _UNSCALED}),
    ("qwen2", {"qkv_bias": False}),
    ("qwen2", {"layer_period": (LayerKind(),)}),
    ("qwen2", {"layer_period": (_NARROW,)}),
    ("qwen2", {"layer_period": (LayerKind(), _WIDER, _WIDER)}),
    ("qwen3", {"qk_norm": "none"}),
    ("qwen3", {"rope": _UNSCALED}),
    ("mistral", {"layer_period": (LayerKind(),)}),
    ("mistral", {"layer_period": (_WIDER,)}),
    ("gemma2", {"attention_soft_cap": None}),
    ("gemma2", {"attention_soft_cap": 2.0}),
    ("gemma2", {"logit_soft_cap": None}),
    ("gemma2", {"query_scale": None}),
    ("gemma2", {"activation": "silu"}),
    ("gemma2", {"norm_scale": "before_cast"}),
    ("gemma2", {"embedding_scale": 1.0}),
    ("gemma2", {"layer_period": (LayerKind(), _NARROW)}),
    ("gemma2", {"layer_period": (_WIDER, LayerKind())}),
    ("gemma3_text", {"qk_norm": "none"}),
    ("gemma3_text", {"rope": RopeFacts("default", 50000.0)}),
    ("gemma3_text", {"layer_period": (_NARROW, _NARROW, LayerKind())}),
    ("gemma3_text", {"layer_period": (LayerKind(families.WINDOW, _UNSCALED), LayerKind())}),
    ("gemma3_text", {"norm_scale": "before_cast"}),
    ("olmo2", {"qk_norm": "none"}),
    ("olmo2", {"norm_scale": "one_plus"}),
    ("mixtral", {"experts": _experts("mixtral", normalises_weights=False)}),
    ("mixtral", {"experts": _experts("mixtral", num_experts_per_tok=3)}),
    ("mixtral", {"layer_period": (LayerKind(has_experts=True),)}),
    ("qwen3_moe", {"experts": _experts("qwen3_moe", normalises_weights=True)}),
    ("qwen3_moe", {"experts": _experts("qwen3_moe", num_experts_per_tok=2)}),
]


@pytest.mark.parametrize(("name", "changes"), MUTATIONS)
def test_a_wrong_fact_shows(name: str, changes: dict[str, Any]) -> None:
    assert gap(name, "packed", facts_of(name, **changes), weights_of(name)) >= BROKEN


def _with_norm_forgotten(patch: pytest.MonkeyPatch, part: str) -> None:
    original = Decoder.__init__

    def init(self: Decoder, facts: ModelFacts, *others: Any) -> None:
        original(self, facts, *others)
        for block in self.model.layers:
            block.norms = dataclasses.replace(block.norms, **{part: None})

    patch.setattr(Decoder, "__init__", init)


@pytest.mark.parametrize("part", ["attention_input", "attention_output", "mlp_input", "mlp_output"])
def test_a_forgotten_norm_around_a_block_shows(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_norm_forgotten(monkeypatch, part)
    assert gap("gemma2", "packed", facts_of("gemma2"), weights_of("gemma2")) >= BROKEN


def _swapped(weights: Tensors, one: str, other: str) -> Tensors:
    swap = {name: name.replace(one, other) for name in weights if one in name}
    swap |= {theirs: ours for ours, theirs in swap.items()}
    return {name: weights[swap.get(name, name)] for name in weights}


def test_matrices_of_experts_mixed_up_show() -> None:
    swapped = _swapped(weights_of("mixtral"), "experts.gate_proj", "experts.up_proj")
    assert gap("mixtral", "packed", facts_of("mixtral"), swapped) >= BROKEN


def test_a_router_of_experts_in_another_order_shows() -> None:
    weights = {n: t.flip(0) if n.endswith("mlp.gate.weight") else t for n, t in weights_of("mixtral").items()}
    assert gap("mixtral", "packed", facts_of("mixtral"), weights) >= BROKEN


def test_the_routers_loss_moves_training() -> None:
    """By more than the tolerance of the comparison with transformers."""
    without = families.transformers_losses("mixtral", router_part=0.0, steps=1)
    expected = families.transformers_losses("mixtral", steps=1)
    assert abs(without[0] - expected[0]) > 100 * LOSSES


@pytest.mark.parametrize("name", families.CONFIGS)
def test_decoding_with_caches_equals_the_whole_row(name: str) -> None:
    """A prompt and then token by token, far enough that windows slide over the cache."""
    facts, prompt, length = facts_of(name), 6, 24
    model = decoder_of(facts)
    tensors = {**weights_of(name), **model.constants()}
    tokens = torch.from_numpy(small.padded_rows(length).tokens)
    positions = torch.arange(length).expand_as(tokens)
    shape = (len(tokens), length, facts.num_key_value_heads, facts.head_dim)
    caches = [KVCache(torch.zeros(shape), torch.zeros(shape)) for _ in range(facts.num_hidden_layers)]

    def run(start: int, stop: int) -> torch.Tensor:
        given = (tokens[:, start:stop], positions[:, start:stop], caches)
        hidden, caches[:] = functional_call(_Cached(model), _under(tensors), given)
        return hidden

    with torch.no_grad():
        pieces = [run(0, prompt), *(run(at, at + 1) for at in range(prompt, length))]
        whole = functional_call(_Hidden(model), _under(tensors), (tokens, positions, torch.ones_like(tokens)))
    assert small.difference(torch.cat(pieces, 1), whole) <= LOGITS


class _Cached(torch.nn.Module):
    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, *given: Any) -> Any:
        return self.model.forward_cached(*given)


class _Hidden(_Cached):
    def forward(self, *given: Any) -> Any:
        return self.model.hidden(*given)


def _under(tensors: Tensors) -> Tensors:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", families.CONFIGS)
def test_training_losses_equal_those_of_transformers(name: str) -> None:
    """The same packed batches through transformers' model, autograd and torch's AdamW."""
    losses, expected = families.our_losses(name), families.transformers_losses(name)
    assert losses == pytest.approx(expected, rel=LOSSES)
    assert expected[-1] < expected[0] - 0.5, "too little was learned to tell two trainings apart"
