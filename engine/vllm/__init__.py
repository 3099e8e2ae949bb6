"""Everything that knows vLLM's insides: a new vLLM release is a change in this room only.

`molehill.engine.vllm.worker.Worker` is what vLLM is given as `worker_cls`.
"""
