"""What is used of vLLM for X-LoRA, seam by seam: a second KV cache for every attention layer, and a
forward in a context that leads to it."""

from molehill.engine.vllm.seams import Seam

SCALING = "engine/vllm/scaling_pass.py"
ATTENTION = "vllm.model_executor.layers.attention.attention"

SEAMS = (
    Seam(
        "vllm.config",
        "get_layers_from_vllm_config",
        SCALING,
        "the layers that have a KV cache, and by which vLLM counts caches",
        positional=("vllm_config", "layer_type"),
        markers=("static_forward_context",),
    ),
    Seam(
        "vllm.model_executor.layers.attention_layer_base",
        "AttentionLayerBase",
        SCALING,
        "what has a KV cache",
    ),
    Seam(
        ATTENTION,
        "Attention.forward",
        SCALING,
        "a layer's cache is that of its name in the step's context",
        markers=("unified_attention_with_output", "self.layer_name"),
    ),
    Seam(
        ATTENTION,
        "Attention",
        SCALING,
        "is copied under another name; its keys and values go by token",
        attributes=("get_kv_cache_spec", "bind_kv_cache"),
    ),
    Seam(
        ATTENTION,
        "get_attention_context",
        SCALING,
        "cache, metadata and slots of a layer are found by its name",
        positional=("layer_name",),
        markers=(
            "attn_metadata_raw[layer_name]",
            "forward_context.no_compile_layers[layer_name]",
            "slot_mapping.get(layer_name)",
        ),
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.get_kv_cache_spec",
        SCALING,
        "every layer that is registered gets a cache of its own",
        markers=("get_layers_from_vllm_config(self.vllm_config", "attn_module.get_kv_cache_spec"),
    ),
    Seam(
        "vllm.model_executor.models.utils",
        "extract_layer_index",
        SCALING,
        "a layer's number is in its name",
        positional=("layer_name",),
    ),
    Seam(
        "vllm.forward_context",
        "ForwardContext",
        SCALING,
        "a copy of it leads to the second caches",
        attributes=("no_compile_layers", "attn_metadata", "slot_mapping"),
    ),
    Seam("vllm.forward_context", "get_forward_context", SCALING, "the step's context"),
    Seam(
        "vllm.forward_context",
        "override_forward_context",
        SCALING,
        "the first pass has a context of its own",
        positional=("forward_context",),
    ),
)
