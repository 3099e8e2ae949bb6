"""Adapters: formats, validation, plan; and, in `molehill.engine.vllm`, serving them."""
