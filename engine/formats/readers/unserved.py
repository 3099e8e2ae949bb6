"""Tuners of PEFT that are refused by name, with what serving them would need.

A matrix of full rank beside W, or one that W is multiplied by, would cost every token as much as
the base's own GEMM does; prompts change the sequence, not a linear.
"""

_FULL = "which would need a matrix as large as W at every linear"
_PRODUCT = "whose {} multiplies W's input: it would need a product of its own before every GEMM"
_PROMPT = "which would need {} in the KV cache of every request: no linear changes"

REASONS = {
    kind: f"{kind}, {what}"
    for kind, what in {
        "OFT": _PRODUCT.format("block-diagonal rotation"),
        "BOFT": _PRODUCT.format("butterfly of rotations"),
        "PSOFT": _PRODUCT.format("rotation of a subspace of W"),
        "ROAD": "whose rotations mix pairs of a linear's outputs: it would need an element-wise "
        "kernel over pairs",
        "FOURIERFT": f"the inverse Fourier transform of a sparse spectrum, {_FULL}",
        "WAVEFT": f"the inverse wavelet transform of a sparse spectrum, {_FULL}",
        "SHIRA": "sparse entries of full rank, which would need a sparse product at every linear",
        "C3A": "blocks of circulant matrices, which would need Fourier transforms at every linear",
        "RANDLORA": f"a sum of random bases of full rank, {_FULL}",
        "HIRA": f"an element-wise product of W and a low-rank pair, {_FULL}",
        "PROMPT_TUNING": _PROMPT.format("trained embeddings before the prompt, and their places"),
        "MULTITASK_PROMPT_TUNING": _PROMPT.format("trained embeddings before the prompt"),
        "P_TUNING": _PROMPT.format("trained embeddings before the prompt, and their places"),
        "CPT": _PROMPT.format("trained embeddings before the prompt, and their places"),
        "PREFIX_TUNING": _PROMPT.format("trained keys and values of every layer"),
        "CARTRIDGE": _PROMPT.format("trained keys and values of every layer"),
        "ADAPTION_PROMPT": "which would need an attention over trained prompts beside every "
        "layer's own",
        "LN_TUNING": "whole norms, which would need norms of an adapter's own: no linear changes",
        "TRAINABLE_TOKENS": "which would need embeddings of an adapter's own: no linear changes",
    }.items()
}
