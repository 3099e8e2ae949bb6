"""What is used of vLLM inside a model: its linears, MoE blocks, attention layers and loaders, seam
by seam."""

from molehill.engine.vllm import scaling_seams
from molehill.engine.vllm.seams import Seam

LAYERS = "vllm.model_executor.layers"
MOE = "vllm.model_executor.layers.fused_moe"
LINEAR = "vllm.model_executor.layers.linear"
# What vLLM hands to the kernels of an MoE block beside its input.
ROUTING = ("topk_weights", "topk_ids", "shared_experts", "shared_experts_input")

DISCOVERY, HOOKS = "engine/vllm/model/discovery.py", "engine/vllm/model/hooks.py"
PROJECTIONS, APART = "engine/vllm/model/projections.py", "engine/vllm/model/linears_apart.py"
BASE_LINEARS = "engine/vllm/model/base_linears.py"
ON_VOCABULARY, LOGITS = "engine/vllm/model/vocabulary.py", "engine/vllm/logits_rows.py"
BASE_ACTIVATIONS = "engine/vllm/model/base_activations.py"
BLOCKS, MERGED = "engine/vllm/model/moe_blocks.py", "engine/vllm/model/checkpoint_loader.py"

LINEARS = (
    Seam(
        LINEAR,
        "LinearBase",
        HOOKS,
        "its quant method is replaced by a subclass",
        attributes=("quant_method", "input_size", "output_size", "params_dtype", "tp_rank"),
    ),
    Seam(
        LINEAR,
        "LinearMethodBase.apply",
        HOOKS,
        "is replaced: the mixture comes after it",
        overrides=("self", "layer", "x", "bias"),
    ),
    *(
        Seam(
            LINEAR,
            f"{kind}.forward",
            HOOKS,
            "calls the quant method, before the ranks' sum",
            markers=("self.quant_method.apply(self, ",),
        )
        for kind in ("ColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear")
    ),
    Seam(
        "vllm.model_executor.layers.fusion.quant_activation",
        "",
        HOOKS,
        "a hooked linear's input stays unquantised",
        markers=('"requires_unquantized_input"',),
    ),
    Seam(
        "vllm.utils.multi_stream_utils",
        "execute_in_parallel",
        BASE_LINEARS,
        "what mixtures begin with runs beside the GEMM",
        positional=("default_fn", "aux_fns", "start_event", "done_events", "aux_streams"),
        keywords=("enable",),
        markers=("if not default_first:\n        default_result = default_fn()",),
    ),
    Seam(
        "vllm.compilation.breakable_cudagraph",
        "BreakableCUDAGraphCapture",
        BASE_LINEARS,
        "a graph with breaks has one stream",
        attributes=("is_active",),
    ),
    Seam(
        LINEAR,
        "ColumnParallelLinear",
        PROJECTIONS,
        "a rank's outputs",
        attributes=("output_size", "output_size_per_partition", "tp_rank"),
    ),
    Seam(
        LINEAR,
        "MergedColumnParallelLinear",
        PROJECTIONS,
        "a rank's outputs of each part",
        attributes=("output_sizes", "tp_rank", "tp_size"),
    ),
    Seam(
        LINEAR,
        "QKVParallelLinear",
        PROJECTIONS,
        "a rank's heads",
        attributes=(
            "head_size",
            "num_heads",
            "num_kv_head_replicas",
            "num_kv_heads",
            "total_num_heads",
            "total_num_kv_heads",
            "v_head_size",
        ),
    ),
    Seam(
        LINEAR,
        "RowParallelLinear",
        PROJECTIONS,
        "a rank's inputs",
        attributes=("input_size_per_partition", "tp_rank"),
    ),
    Seam(
        f"{MOE}.router.gate_linear",
        "GateLinear",
        DISCOVERY,
        "a router, and the kernels that it may run in",
        attributes=("allow_specialized_router_gemm",),
    ),
    Seam(
        "vllm.model_executor.models.utils",
        "WeightsMapper",
        DISCOVERY,
        "what a model calls otherwise than Transformers does",
        attributes=("orig_to_new_substr", "orig_to_new_suffix"),
    ),
    Seam(
        "vllm.model_executor.models.interfaces",
        "supports_multimodal",
        APART,
        "tells multimodal models from others",
        positional=("model",),
    ),
    Seam(
        "vllm.model_executor.models.interfaces",
        "SupportsMultiModal.get_language_model",
        APART,
        "the part whose rows are tokens",
        positional=("self",),
    ),
    Seam(
        f"{LAYERS}.attention.attention",
        "Attention.forward",
        "engine/vllm/model/finite_cache.py",
        "is given the keys and values that it caches",
        positional=("self", "query", "key", "value"),
    ),
    Seam(
        f"{LAYERS}.attention.mla_attention",
        "MLAAttention",
        APART,
        "a linear whose weights are in others too",
        attributes=("kv_b_proj",),
    ),
    Seam(
        f"{LAYERS}.mamba.mamba_mixer2",
        "MambaMixer2",
        APART,
        "a linear whose rows may be on several ranks",
        attributes=("in_proj", "tp_size"),
    ),
    Seam("vllm.model_executor.layers.activation", "SiluAndMul", DISCOVERY, "a gated FFN"),
    Seam(
        "vllm.model_executor.layers.activation",
        "GeluAndMul",
        DISCOVERY,
        "a gated FFN",
        attributes=("approximate",),
    ),
    Seam(
        "vllm.model_executor.custom_op",
        "CustomOp",
        BASE_ACTIVATIONS,
        "a replaced activation, for steps without adapters",
        attributes=("enabled", "forward_native"),
    ),
    Seam(
        "vllm.model_executor.custom_op",
        "CustomOp.maybe_compile",
        BASE_ACTIVATIONS,
        "compiles a replaced activation by itself",
        positional=("self", "fn"),
    ),
)

EXPERTS = (
    Seam(
        f"{MOE}.runner.moe_runner",
        "MoERunner",
        BLOCKS,
        "an MoE block",
        attributes=("moe_config", "routed_experts", "router", "routed_input_transform"),
    ),
    Seam(
        f"{MOE}.config",
        "FusedMoEConfig",
        BLOCKS,
        "what an MoE block is",
        attributes=(
            "activation",
            "has_bias",
            "hidden_dim_unpadded",
            "in_dtype",
            "intermediate_size",
            "is_lora_enabled",
            "moe_parallel_config",
            "num_experts",
            "num_logical_experts",
            "swiglu_limit",
        ),
    ),
    Seam(
        f"{MOE}.config",
        "FusedMoEParallelConfig",
        BLOCKS,
        "this rank's part of an MoE block",
        attributes=("dp_size", "is_sequence_parallel", "pcp_size", "tp_rank", "tp_size", "use_ep"),
    ),
    Seam(
        f"{MOE}.activation",
        "MoEActivation",
        BLOCKS,
        "the experts' activation",
        markers=('"silu"', '"gelu"', '"gelu_tanh"', '"swigluoai"'),
    ),
    Seam(
        f"{MOE}.routed_experts",
        "RoutedExperts",
        BLOCKS,
        "its quant method is replaced by a subclass",
        attributes=("quant_method", "apply_router_weight_on_input"),
    ),
    Seam(
        f"{MOE}.routed_experts",
        "RoutedExperts.forward_modular",
        HOOKS,
        "calls the quant method, before the ranks' sum",
        overrides=("self", "x", *ROUTING),
        markers=("self.quant_method.apply(",),
    ),
    Seam(
        f"{MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod",
        BLOCKS,
        "the experts' weights, and the kernel that reads them",
        attributes=("experts_cls", "moe", "moe_kernel", "unquantized_backend"),
        markers=('"w13_weight"', '"w2_weight"', '"w13_bias"', '"w2_bias"'),
    ),
    Seam(
        f"{MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod.apply",
        HOOKS,
        "is replaced: the mixture comes beside it",
        overrides=("self", "layer", "x", *ROUTING),
    ),
    Seam(
        f"{MOE}.oracle.unquantized",
        "UnquantizedMoeBackend",
        BLOCKS,
        "whether the experts' weights are plain",
        attributes=("TRITON",),
    ),
    Seam(
        f"{MOE}.modular_kernel",
        "FusedMoEKernel",
        BLOCKS,
        "the kernel that reads the experts' weights",
        attributes=("fused_experts",),
    ),
    Seam(
        f"{MOE}.experts.cpu_moe",
        "CPUUnquantizedExperts",
        BLOCKS,
        "how the experts' weights are packed",
        attributes=("isa", "_use_zentorch"),
        platform="cpu",
    ),
    Seam(
        "vllm._custom_ops",
        "cpu_prepack_moe_weight",
        BLOCKS,
        "how the experts' weights are packed",
        positional=("weight", "isa"),
    ),
    Seam(f"{MOE}.router.zero_expert_router", "ZeroExpertRouter", BLOCKS, "experts without weights"),
)

VOCABULARY = (
    Seam(
        f"{LAYERS}.vocab_parallel_embedding",
        "VocabParallelEmbedding",
        ON_VOCABULARY,
        "its quant method is replaced by a subclass; a rank's part of the vocabulary",
        attributes=(
            "embedding_dim",
            "org_vocab_size",
            "quant_method",
            "shard_indices",
            "use_fused_embedding",
        ),
    ),
    Seam(
        f"{LAYERS}.vocab_parallel_embedding",
        "VocabParallelEmbedding.forward",
        ON_VOCABULARY,
        "calls the quant method, before the ranks' sum",
        markers=("self.quant_method.embedding(self, ", "if self.use_fused_embedding:"),
    ),
    Seam(f"{LAYERS}.vocab_parallel_embedding", "ParallelLMHead", ON_VOCABULARY, "the LM head"),
    Seam(
        f"{LAYERS}.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.embedding",
        ON_VOCABULARY,
        "is replaced: the adapters come after it",
        overrides=("self", "layer", "input_"),
    ),
    Seam(
        f"{LAYERS}.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.apply",
        ON_VOCABULARY,
        "is replaced: the adapters come after it",
        overrides=("self", "layer", "x", "bias"),
    ),
    Seam(
        f"{LAYERS}.logits_processor",
        "LogitsProcessor._apply_head",
        ON_VOCABULARY,
        "calls the head's quant method, before the ranks' logits are gathered",
        markers=("lm_head.quant_method.apply(", "self.head_dtype == hidden_states.dtype"),
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._get_prompt_logprobs_dict",
        LOGITS,
        "is extended on the model runner: logits of prompts are of its hidden states' rows",
        overrides=("self", "hidden_states", "num_scheduled_tokens"),
        markers=(
            "prompt_hidden_states = hidden_states[offset : offset + num_logits]",
            "self.model.compute_logits(prompt_hidden_states)",
        ),
    ),
    Seam(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.make_lora_inputs",
        LOGITS,
        "logits lie as the requests do",
        markers=("req_lora_mapping.repeat(num_sampled_tokens)",),
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.sample",
        LOGITS,
        "is extended on the second model runner: the rows that are sampled from",
        overrides=("self", "hidden_states", "input_batch", "grammar_output"),
        markers=("hidden_states[input_batch.logits_indices]", "self.model.compute_logits("),
        platform="gpu",
    ),
    Seam(
        "vllm.v1.worker.gpu.sample.prompt_logprob",
        "compute_prompt_logprobs_with_chunking",
        LOGITS,
        "logits of prompts are of its hidden states' rows",
        markers=("logits_fn(prompt_hidden_states[start_idx:end_idx])",),
        platform="gpu",
    ),
)

LOADING = (
    Seam(
        "vllm.model_executor.model_loader",
        "register_model_loader",
        MERGED,
        "brings a loader that merges",
        positional=("load_format",),
    ),
    Seam(
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader",
        MERGED,
        "is extended",
        overrides=("load_config",),
    ),
    Seam(
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader.get_all_weights",
        MERGED,
        "is extended: a checkpoint's tensors one by one",
        overrides=("self", "model_config", "model"),
    ),
)

STAGES = (
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "engine/vllm/pipeline.py",
        "what a stage takes from the one before it",
        attributes=("intermediate_tensors", "max_num_tokens", "model", "device"),
        markers=("self.model.make_empty_intermediate_tensors(",),
        platform="cpu",
    ),
)

SEAMS: tuple[Seam, ...] = (
    *LINEARS,
    *EXPERTS,
    *VOCABULARY,
    *LOADING,
    *STAGES,
    *scaling_seams.SEAMS,
)
