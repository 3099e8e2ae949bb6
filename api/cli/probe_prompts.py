"""The probe prompts on which a lossy merge is measured."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from molehill.engine.adapter.model import Adapter
from molehill.engine.hf import logit_drift
from molehill.engine.hf.logit_drift import LogitChange

PROMPTS = (
    "The capital of France is",
    "### Instruction:\nWrite the number 305.\n\n### Output:\n",
    "### Instruction:\nWhat is the opposite of tall?\n\n### Output:\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time there was a small town by the sea, and in that town lived",
    "Water boils at 100 degrees Celsius, which is",
)


def logit_change(model: str, before: Adapter, after: Adapter) -> LogitChange:
    """Between two adapters on the base `model` (directory or cached name), in float32.

    Raises OSError or ValueError where the model or its tokenizer cannot be read.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    return logit_drift.logit_change(loaded, before, after, prompts)


__all__ = ["PROMPTS", "LogitChange", "logit_change"]
