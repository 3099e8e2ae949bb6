"""What molehill replaces of vLLM's own computation on CPU, seam by seam."""

from molehill.engine.vllm.seams import Seam

ROTARY_EMBEDDING = "vllm.model_executor.layers.rotary_embedding.base"

SEAMS = (
    Seam(
        "vllm.v1.sample.sampler",
        "batched_count_greater_than",
        "engine/vllm/token_ranks.py",
        "the ranks of tokens are counted otherwise, on CPU",
        platform="cpu",
    ),
    Seam(
        ROTARY_EMBEDDING,
        "RotaryEmbedding.forward_cpu",
        "engine/vllm/rotary_embedding.py",
        "is replaced where heads are a dimension of their own, which its kernel does not take",
        overrides=("self", "positions", "query", "key"),
        markers=("ops.rotary_embedding(",),
        platform="cpu",
    ),
    Seam(
        ROTARY_EMBEDDING,
        "RotaryEmbedding.forward_native",
        "engine/vllm/rotary_embedding.py",
        "takes them",
        positional=("self", "positions", "query", "key"),
        platform="cpu",
    ),
)
