"""What adapters' chats use of vLLM's rendering."""

from molehill.engine.vllm.seams import Seam

CHATS, TOKENIZERS = "api/vllm/adapter_chats.py", "api/vllm/adapter_tokenizers.py"

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
    Seam(
        "vllm.renderers.online_renderer",
        "OnlineRenderer.preprocess_completion",
        TOKENIZERS,
        "runs on a copy, whose renderer has the adapter's tokenizer",
        positional=("self", "request", "prompt_input", "prompt_embeds"),
        keywords=("skip_mm_cache",),
        markers=("self.preprocess_cmpl(request, ",),
    ),
    *(
        Seam(
            "vllm.entrypoints.serve.tokenize.serving",
            f"ServingTokenization.{method}",
            TOKENIZERS,
            "runs on a copy, whose renderer has the adapter's tokenizer",
            positional=("self", "request", "raw_request"),
            markers=("self.renderer.",),
        )
        for method in ("create_tokenize", "create_detokenize")
    ),
    Seam(
        "vllm.renderers.base",
        "BaseRenderer",
        TOKENIZERS,
        "is copied: its tokenizer, and what is bound to it",
        attributes=("_async_tokenizer_decode", "_executor", "_tokenize_prompt_async", "tokenizer"),
    ),
    Seam(
        "vllm.v1.engine.output_processor",
        "OutputProcessor.add_request",
        TOKENIZERS,
        "runs on a copy with the adapter's tokenizer",
        positional=("self", "request", "prompt", "parent_req", "request_index", "queue"),
        markers=("tokenizer=self.tokenizer,", "self.request_states[request_id] = req_state"),
    ),
    Seam(
        "vllm.tokenizers.hf",
        "maybe_make_thread_pool",
        TOKENIZERS,
        "wraps a tokenizer, and pickles as a call of itself",
        positional=("tokenizer", "copies"),
        markers=("return maybe_make_thread_pool, (og_tokenizer, copies)",),
    ),
    Seam(
        "vllm.tokenizers.hf",
        "get_cached_tokenizer",
        TOKENIZERS,
        "wraps a tokenizer, and pickles as a call of itself",
        positional=("tokenizer",),
        markers=("return get_cached_tokenizer, (tokenizer,)",),
    ),
    Seam(
        "vllm.utils.async_utils",
        "make_async",
        TOKENIZERS,
        "has a method run in the renderer's threads",
        positional=("func", "executor"),
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
