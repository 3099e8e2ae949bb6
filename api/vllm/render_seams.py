"""What adapters' chats use of vLLM's rendering."""

from molehill.engine.vllm.seams import Seam

CHATS = "api/vllm/adapter_chats.py"

RENDERING: tuple[Seam, ...] = (
    Seam(
        "vllm.renderers.online_renderer",
        "OnlineRenderer",
        CHATS,
        "renders the chats of all routes",
        attributes=(
            "chat_template",
            "model_config",
            "preprocess_chat",
            "renderer",
            "use_harmony",
        ),
        markers=("await self.preprocess_chat(", "request.build_chat_params("),
    ),
    Seam(
        "vllm.renderers.online_renderer",
        "OnlineRenderer.preprocess_chat",
        CHATS,
        "is replaced on the renderer, which gets the adapter's template",
        positional=(
            "self",
            "request",
            "messages",
            "default_template",
            "default_template_content_format",
            "default_template_kwargs",
        ),
        keywords=("tool_dicts",),
    ),
    Seam(
        "vllm.renderers.hf",
        "resolve_chat_template",
        CHATS,
        "the base's template",
        positional=("tokenizer", "chat_template", "tools"),
        keywords=("model_config",),
    ),
    Seam("vllm.renderers.hf", "HfRenderer", CHATS, "whether chats are rendered by templates"),
    Seam(
        "vllm.sampling_params",
        "SamplingParams.update_from_generation_config",
        "api/vllm/stop_tokens.py",
        "ends an answer at more tokens",
        positional=("self", "generation_config"),
        markers=("if not self.ignore_eos:", "self.stop_token_ids = "),
    ),
)
