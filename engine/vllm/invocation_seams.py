"""What is used of vLLM for activated adapters and for captured routing, seam by seam: keys of
blocks, a step's rows, and what requests say of themselves."""

from molehill.engine.vllm.seams import Seam

INVOCATION, KEYS_FILE = "engine/vllm/invocation_rows.py", "engine/vllm/prefix_keys.py"
EVENTS_FILE = "engine/vllm/block_events.py"
FOLLOWING, ROUTING = "engine/vllm/step_following.py", "engine/vllm/routing_capture.py"

PREFIX_KEYS = Seam(
    "vllm.v1.core.kv_cache_utils",
    "generate_block_hash_extra_keys",
    KEYS_FILE,
    "is replaced: an activated adapter's blocks before its invocation are the base's",
    overrides=("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    markers=("_gen_lora_extra_hash_keys(request)", "return tuple(extra_keys), new_start_mm_idx"),
)
LORA_KEY = Seam(
    PREFIX_KEYS.module,
    "_gen_lora_extra_hash_keys",
    KEYS_FILE,
    "the path is in the prefix cache's key, so a new generation finds none of the old one's",
    markers=('[("lora", lora_request.lora_name, ', "lora_request.lora_path"),
)
EVENT_KEYS = Seam(
    PREFIX_KEYS.module,
    "to_event_extra_keys",
    KEYS_FILE,
    "of an adapter's key, events show the name",
    positional=("extra_keys",),
    markers=("else key[1] for key in keys",),
)

KEYS = (PREFIX_KEYS, LORA_KEY, EVENT_KEYS)

# Events of stored blocks, which name the adapter of the request.
EVENTS = (
    Seam(
        "vllm.v1.core.block_pool",
        "BlockPool._build_block_stored_event",
        EVENTS_FILE,
        "is extended: blocks before an invocation carry no adapter's name",
        markers=("to_event_extra_keys(extra_keys_list)", "lora_name=request.lora_request.name"),
    ),
    Seam(
        "vllm.v1.core.block_pool",
        "BlockPool.cache_full_blocks",
        EVENTS_FILE,
        "queues the event of the blocks from the invocation on, whose lists are by block",
        markers=(
            "self.kv_event_queue.append(\n                self._build_block_stored_event(",
            *("request,", "block_hashes=new_hashes,", "parent_block_hash=parent_block_hash,"),
            *("start_token_idx=start_token_idx,", "end_token_idx=end_token_idx,"),
            *("block_size=block_size,", "extra_keys_list=extra_keys_list,"),
        ),
    ),
    Seam(
        "vllm.v1.core.block_pool",
        "BlockPool.cache_partial_block",
        EVENTS_FILE,
        "is extended: blocks before an invocation carry no adapter's name",
        overrides=(
            *("self", "request", "block", "num_tokens", "kv_cache_group_id", "block_size"),
            "replace_existing_hashes",
        ),
        markers=("extra_keys=to_event_extra_keys([extra_keys])",),
    ),
    Seam(
        "vllm.v1.core.block_pool",
        "BlockPool",
        EVENTS_FILE,
        "where events wait",
        attributes=("hash_block_size", "kv_event_queue"),
    ),
    Seam(
        PREFIX_KEYS.module,
        "resolve_block_hashes",
        EVENTS_FILE,
        "the block before the invocation's",
        positional=("block_hashes", "hash_block_size", "block_size"),
    ),
    Seam(
        PREFIX_KEYS.module,
        "maybe_convert_block_hash",
        EVENTS_FILE,
        "the block before the invocation's",
        positional=("hash_bytes",),
    ),
)

# What the requests of a step are, and how far they are computed.
STEPS = (
    Seam(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        INVOCATION,
        "which rows come before an invocation",
        attributes=("finished_req_ids", "scheduled_cached_reqs", "scheduled_new_reqs"),
    ),
    Seam(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        INVOCATION,
        "which rows come before an invocation",
        attributes=(
            "lora_request",
            "num_computed_tokens",
            "prompt_len",
            "prompt_token_ids",
            "req_id",
            "sampling_params",
        ),
    ),
    Seam(
        "vllm.v1.core.sched.output",
        "CachedRequestData",
        FOLLOWING,
        "which rows come before an invocation",
        attributes=("num_computed_tokens", "req_ids"),
    ),
    Seam(
        "vllm.v1.request",
        "Request",
        KEYS_FILE,
        "where its adapter is activated",
        attributes=("lora_request", "num_prompt_tokens", "prompt_token_ids", "request_id"),
    ),
    Seam(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin.set_active_loras",
        FOLLOWING,
        "is extended on the model runner: the order of a step's requests",
        overrides=(
            "self",
            "input_batch",
            "num_scheduled_tokens",
            "num_sampled_tokens",
            "mapping_type",
        ),
        markers=("input_batch.make_lora_inputs(num_scheduled_tokens, num_sampled_tokens)",),
    ),
    Seam(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.make_lora_inputs",
        FOLLOWING,
        "rows lie as the requests do",
        markers=("req_lora_mapping.repeat(num_scheduled_tokens)",),
    ),
    Seam(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        FOLLOWING,
        "the order of a step's requests",
        attributes=("req_ids",),
    ),
    Seam(
        "vllm.v1.worker.gpu.lora_utils",
        "LoraState.make_lora_inputs",
        FOLLOWING,
        "is extended on the second model runner's state: the order of a step's requests",
        overrides=("self", "req_ids", "idx_mapping", "num_scheduled_tokens"),
        markers=("lora_ids.repeat(num_scheduled_tokens)",),
        platform="gpu",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.__init__",
        FOLLOWING,
        "the second model runner's state",
        markers=("self.lora_state = LoraState(",),
        platform="gpu",
    ),
)

# How a request that asks for its routing is known to the workers.
REQUESTS = (
    Seam(
        "vllm.sampling_params",
        "SamplingParams",
        ROUTING,
        "says that a request asks for its routing, and reads no prefix cache",
        attributes=("extra_args", "skip_reading_prefix_cache", "clone"),
    ),
    Seam(
        "vllm.v1.engine.parallel_sampling",
        "ParentRequest.get_child_info",
        ROUTING,
        "tells the samples of one prompt apart",
        markers=('f"{index}_{self.request_id}"',),
    ),
)

SEAMS: tuple[Seam, ...] = (*KEYS, *EVENTS, *STEPS, *REQUESTS)
