"""Adapters, their file formats, validation and plan; and, in `molehill.engine.vllm`, serving them."""
