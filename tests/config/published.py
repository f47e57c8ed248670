"""config.json files as published, in the fields that say what a model is, and how many parameters it has."""

from __future__ import annotations

from typing import Any


def _config(model_type: str, architecture: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """sizes: vocabulary, hidden, intermediate, layers, heads, kv heads, positions."""
    vocab, hidden, intermediate, layers, heads, kv_heads, positions = sizes
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        **more,
    }


def _qwen2(sizes: tuple[int, ...], tied: bool) -> dict[str, Any]:
    return _config(
        *("qwen2", "Qwen2ForCausalLM", sizes),
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_word_embeddings=tied,
        use_sliding_window=False,
        sliding_window=sizes[6],
        max_window_layers=sizes[3],
    )


def _qwen3(sizes: tuple[int, ...], tied: bool) -> dict[str, Any]:
    return _config(
        *("qwen3", "Qwen3ForCausalLM", sizes),
        hidden_act="silu",
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1000000,
        tie_word_embeddings=tied,
        attention_bias=False,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=sizes[3],
    )


def _gemma2(sizes: tuple[int, ...], head_dim: int, query_scalar: int) -> dict[str, Any]:
    return _config(
        *("gemma2", "Gemma2ForCausalLM", sizes),
        head_dim=head_dim,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=query_scalar,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
    )


def _gemma3(sizes: tuple[int, ...], head_dim: int, scalar: int, window: int, scaled: bool) -> dict[str, Any]:
    return _config(
        *("gemma3_text", "Gemma3ForCausalLM", sizes),
        head_dim=head_dim,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=scalar,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        sliding_window=window,
        sliding_window_pattern=6,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0} if scaled else None,
    )


def _mixtral(sizes: tuple[int, ...]) -> dict[str, Any]:
    return _config(
        *("mixtral", "MixtralForCausalLM", sizes),
        hidden_act="silu",
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        output_router_logits=False,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
    )


def _qwen3_moe(sizes: tuple[int, ...], width: int) -> dict[str, Any]:
    return _config(
        *("qwen3_moe", "Qwen3MoeForCausalLM", sizes),
        hidden_act="silu",
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=width,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        attention_bias=False,
        use_sliding_window=False,
        sliding_window=None,
        tie_word_embeddings=False,
    )


_MISTRAL = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}

# Name -> (config.json, parameters in all, a tied head once).
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen2.5-0.5B": (_qwen2((151936, 896, 4864, 24, 14, 2, 32768), True), 494_032_768),
    "Qwen2.5-7B": (_qwen2((152064, 3584, 18944, 28, 28, 4, 131072), False), 7_615_616_512),
    "Qwen2.5-72B": (_qwen2((152064, 8192, 29568, 80, 64, 8, 131072), False), 72_706_203_648),
    "Qwen3-0.6B": (_qwen3((151936, 1024, 3072, 28, 16, 8, 40960), True), 596_049_920),
    "Qwen3-8B": (_qwen3((151936, 4096, 12288, 36, 32, 8, 40960), False), 8_190_735_360),
    "Qwen3-32B": (_qwen3((151936, 5120, 25600, 64, 64, 8, 40960), False), 32_762_123_264),
    "Mistral-7B-v0.1": (
        _config(
            *("mistral", "MistralForCausalLM", (32000, 4096, 14336, 32, 32, 8, 32768)),
            **_MISTRAL,
            sliding_window=4096,
            rope_theta=10000.0,
        ),
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        _config(
            *("mistral", "MistralForCausalLM", (32768, 4096, 14336, 32, 32, 8, 32768)),
            **_MISTRAL,
            sliding_window=None,
            rope_theta=1000000.0,
        ),
        7_248_023_552,
    ),
    "Gemma-2-2b": (_gemma2((256000, 2304, 9216, 26, 8, 4, 8192), 256, 256), 2_614_341_888),
    "Gemma-2-9b": (_gemma2((256000, 3584, 14336, 42, 16, 8, 8192), 256, 256), 9_241_705_984),
    "Gemma-2-27b": (_gemma2((256000, 4608, 36864, 46, 32, 16, 8192), 128, 144), 27_227_128_320),
    "Gemma-3-270m": (_gemma3((262144, 640, 2048, 18, 4, 1, 32768), 256, 256, 512, False), 268_098_176),
    "Gemma-3-1b": (_gemma3((262144, 1152, 6912, 26, 4, 1, 32768), 256, 256, 512, False), 999_885_952),
    "Gemma-3-27b text": (
        _gemma3((262208, 5376, 21504, 62, 32, 16, 131072), 128, 168, 1024, True),
        27_009_346_304,
    ),
    "OLMo-2-7B": (
        _config(
            *("olmo2", "Olmo2ForCausalLM", (100352, 4096, 11008, 32, 32, 32, 4096)),
            hidden_act="silu",
            attention_bias=False,
            rms_norm_eps=1e-6,
            rope_theta=500000,
            tie_word_embeddings=False,
        ),
        7_298_617_344,
    ),
    "Mixtral-8x7B": (_mixtral((32000, 4096, 14336, 32, 32, 8, 32768)), 46_702_792_704),
    "Mixtral-8x22B": (_mixtral((32768, 6144, 16384, 56, 48, 8, 65536)), 140_630_071_296),
    "Qwen3-30B-A3B": (_qwen3_moe((151936, 2048, 6144, 48, 32, 4, 40960), 768), 30_532_122_624),
    "Qwen3-235B-A22B": (_qwen3_moe((151936, 4096, 12288, 94, 64, 4, 40960), 1536), 235_093_634_560),
}
