"""Names of what an adapter changes on the vocabulary, outside the layers.

The embedding is adapted at `embed_tokens` (`wte` in GPT-2): a linear from token ids, taken one-hot,
to hidden states. The LM head is adapted at `lm_head`, tied to the embedding or not: one of them
changed leaves the other as it is.
"""

EMBEDDINGS = ("embed_tokens", "wte")
HEADS = ("lm_head",)


def is_embedding(site: str) -> bool:
    """Whether a site is the embedding."""
    return site in EMBEDDINGS


def is_head(site: str) -> bool:
    """Whether a site is the LM head."""
    return site in HEADS


def is_on_vocabulary(site: str) -> bool:
    """Whether a site is the embedding or the LM head."""
    return is_embedding(site) or is_head(site)
