"""Configs of tiny bases that came out lately, by a name of theirs: what differs from
`tiny_models.SIZES`.

`model_type` where it is not the name. Heads are of a width that vLLM's attention takes on CPU.
"""

from collections.abc import Mapping
from typing import Any

TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
WIDE_HEADS = {"head_dim": 32}
SLIDING_AND_FULL = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {
    **WIDE_HEADS,
    "global_head_dim": 32,
    "num_kv_shared_layers": 0,
    "num_global_key_value_heads": None,
    "hidden_size_per_layer_input": 0,
    **SLIDING_AND_FULL,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    # The only latent width of vLLM's CPU kernel: 576.
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {**WIDE_HEADS, "query_pre_attn_scalar": 24, **SLIDING_AND_FULL},
    "gemma4_text": GEMMA4,
    "gemma4_key_as_value": {
        "model_type": "gemma4_text",
        **GEMMA4,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
    },
    "gemma4_per_layer_inputs": {
        "model_type": "gemma4_text",
        **GEMMA4,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512,
        "num_kv_shared_layers": 2,
    },
    "ministral3": WIDE_HEADS,
    "granite": {
        **TWO_HEADS,
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
    "olmo3": {**TWO_HEADS, **SLIDING_AND_FULL},
    "smollm3": {**TWO_HEADS, "no_rope_layers": [1, 0]},
    # Wider than the prompts: vLLM's window has one token more than Transformers'.
    "cohere2": {**TWO_HEADS, **SLIDING_AND_FULL, "sliding_window": 128},
    "exaone4": {**TWO_HEADS, **SLIDING_AND_FULL},
    "seed_oss": WIDE_HEADS,
    "apertus": TWO_HEADS,
    "starcoder2": {**TWO_HEADS, "sliding_window": None},
    "nemotron": TWO_HEADS,
    "glm4": WIDE_HEADS,
    "qwen3_moe": {**WIDE_HEADS, **ROUTED, "norm_topk_prob": True},
    "qwen2_moe": {**TWO_HEADS, **ROUTED, "shared_expert_intermediate_size": 48},
    "granitemoe": {**TWO_HEADS, **EXPERTS},
    "granitemoeshared": {**TWO_HEADS, **EXPERTS, "shared_intermediate_size": 48},
    "granitemoehybrid": {
        **TWO_HEADS,
        **MAMBA,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 96,
        "layer_types": ["mamba", "attention"],
    },
    "falcon_h1": {**TWO_HEADS, **MAMBA, "mamba_d_ssm": 128},
    "nemotron_h": {
        **TWO_HEADS,
        **WIDE_HEADS,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "lfm2": {
        **TWO_HEADS,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "block_dim": 64,
        "conv_dim": 64,
    },
    "lfm2_moe": {
        **TWO_HEADS,
        **ROUTED,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "deepseek_v3": DEEPSEEK,
    # As it was published: vLLM has another rotary embedding for it.
    "deepseek_v3_yarn": {
        "model_type": "deepseek_v3",
        **DEEPSEEK,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "falcon": {
        "num_attention_heads": 2,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "alibi": False,
        "bias": False,
    },
}
