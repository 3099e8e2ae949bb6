"""What is used of vLLM for its `routed_experts`, seam by seam."""

from molehill.engine.vllm.seams import Seam

OPTION, CALLS = "api/vllm/routed_experts_option.py", "api/vllm/routed_calls.py"

ROUTED_OPTION: tuple[Seam, ...] = (
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs",
        OPTION,
        "vLLM's option, which it refuses for dense bases",
        attributes=("enable_return_routed_experts",),
    ),
    Seam(
        "vllm.transformers_utils.model_arch_config_convertor",
        "ModelArchConfigConvertorBase",
        OPTION,
        "whether a base is dense",
        positional=("hf_config", "hf_text_config"),
        attributes=("get_num_experts",),
    ),
)

ROUTED_EXPERTS: tuple[Seam, ...] = (
    Seam(
        "vllm.outputs",
        "CompletionOutput",
        CALLS,
        "is given a mixture's choices once it has ended",
        attributes=("finish_reason", "index", "routed_experts", "token_ids"),
    ),
    Seam(
        "vllm.sampling_params",
        "SamplingParams",
        CALLS,
        "from where on a prompt's choices are wanted",
        attributes=("routed_experts_prompt_start",),
    ),
    Seam(
        "vllm.config",
        "ModelConfig",
        "api/app.py",
        "layers of a base",
        attributes=("get_total_num_hidden_layers",),
    ),
    Seam(
        "vllm.entrypoints.scale_out.token_in_token_out.serving",
        "",
        "api/vllm/routed_experts.py",
        "writes the choices, in the last chunk of a stream too",
        markers=("numpy2base64(output.routed_experts)",),
    ),
)
