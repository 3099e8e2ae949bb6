"""vLLM's general plugin: what every process of vLLM needs before it knows the model.

vLLM calls it in the API server, the engine core, the workers, and in the process that looks into a
model's file; in some of them more than once.
"""

from molehill.engine.vllm import absent_torchvision, json_logs, prefix_keys, shm_wait


def install() -> None:
    json_logs.install()
    absent_torchvision.install()
    shm_wait.install()
    prefix_keys.install()
