"""EleutherAI's lm-evaluation-harness on the number tasks: of a server, and on Transformers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molehill.engine import formats
from molehill.engine.hf.reference import attach

REPOSITORY = Path(__file__).parents[2]
TASKS = REPOSITORY / "tests" / "data" / "lm_eval"
CHOICE, WRITE = "numwords_choice", "numwords_write"

INSTALLED = find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(
    not INSTALLED, reason="lm-eval is not installed: it comes with the extra `eval`"
)


@dataclass(frozen=True)
class Scored:
    """One model on one task. score: the task's metric, 0 to 1. answers: of each item, in the
    task's order: (log-likelihood, whether greedy decoding says it) of each choice, or the text."""

    score: float
    answers: list[Any]

    @property
    def likelihoods(self) -> torch.Tensor:
        """Of all choices `[items, choices]`."""
        return torch.tensor([[value for value, _ in choices] for choices in self.answers])

    @property
    def greedy(self) -> list[list[bool]]:
        return [[said for _, said in choices] for choices in self.answers]

    @property
    def chosen(self) -> list[int]:
        best: list[int] = self.likelihoods.argmax(-1).tolist()
        return best


def evaluate(lm: Any, task: str, model_args: dict[str, Any] | None = None, **more: Any) -> Scored:
    """lm: lm-eval's name of a kind of model, with its model_args, or one of its models. Runs in
    the repository's root, which the tasks' paths start from. more: of `simple_evaluate`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    result = simple_evaluate(
        model=lm,
        model_args=model_args,
        tasks=[task],
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        bootstrap_iters=0,
        **more,
    )
    assert result is not None
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    metric = "acc" if task == CHOICE else "exact_match"
    (score,) = (v for k, v in result["results"][task].items() if k.split(",")[0] == metric)
    answers = [sample["filtered_resps"] for sample in samples]
    return Scored(score, answers if task == CHOICE else [text for (text,) in answers])


def of_server(url: str, name: str, tokenizer: Path, path: str, **more: Any) -> dict[str, Any]:
    """The arguments of lm-eval's local-completions and local-chat-completions."""
    return {"base_url": f"{url}/v1/{path}", "model": name, "tokenizer": str(tokenizer), **more}


@contextmanager
def on_transformers(model: Path, adapter: Path | None, batch_size: int = 16) -> Iterator[Any]:
    """lm-eval's model of Transformers in float32 on CPU, with the adapter by the reference."""
    from lm_eval.models.huggingface import HFLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(attach(base, formats.read(adapter)))
        yield HFLM(
            pretrained=base,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            device="cpu",
        )
