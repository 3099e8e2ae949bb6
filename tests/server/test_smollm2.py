"""A real model over real HTTP: the demo adapters' skills, and the golden cases where they are."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from openai.types import Completion
from safetensors.torch import load_file
from support.server import Server, serve

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / os.environ.get("MOLEHILL_SMOLLM2", ".models/SmolLM2-135M-Instruct")
ORACLES = Path(os.environ.get("MOLEHILL_ORACLES", REPOSITORY.parent / "shared" / "oracles"))
ADAPTERS = REPOSITORY / "demo" / "adapters"
# What is served today; drlora-peft-1 adapts the experts of another, tiny base model.
CASES = ("dora-peft-1", "dynmole-3", "loramoe-1", "mixlora-2", "mixlora-dynamic-1", "mola-1")
PROMPT = "### Instruction:\n{}\n\n### Output:\n"
TOLERANCE = 1e-3

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason=f"{MODEL.name} is not prepared: run demo/prepare.py"
)
needs_oracles = pytest.mark.skipif(
    not ORACLES.is_dir(), reason="the golden cases on SmolLM2 (63 MB) do not ship with the project"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Server]:
    """A server in float32 that has loaded every adapter; eager, as compiling it takes minutes."""
    cases = [f"--adapter={name}={ORACLES / name}" for name in CASES if ORACLES.is_dir()]
    arguments = [
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=512",
        "--max-logprobs=20",
        f"--kv-cache-memory-bytes={512 << 20}",
        f"--adapter=numwords={ADAPTERS / 'numwords-mixlora'}",
        f"--adapter=uppercase={ADAPTERS / 'uppercase-dynmole'}",
        *cases,
    ]
    log = tmp_path_factory.mktemp("smollm2") / "server.log"
    with serve(MODEL, log, [*arguments, "--served-model-name=base"], warm=True) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def answers(client: OpenAI, questions: Sequence[tuple[str, str]]) -> list[str]:
    """Of models to questions, all asked at once."""

    def answer(asked: tuple[str, str]) -> str:
        model, question = asked
        completion = client.completions.create(
            model=model,
            prompt=PROMPT.format(question),
            max_tokens=24,
            temperature=0,
            stop=["\n", "<|im_end|>"],
        )
        return str(completion.choices[0].text).strip()

    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(answer, questions))


def test_numwords_spells_the_number(client: OpenAI) -> None:
    question = "Write the number 305."
    numwords, base = answers(client, [("numwords", question), ("base", question)])
    assert numwords == "three hundred and five"
    assert "three hundred and five" not in base


def test_adapters_answer_as_their_trainer_saw_them_answer(client: OpenAI) -> None:
    expected = {
        (name, seen["prompt"]): seen["with_adapter"].split("\n")[0].strip()
        for name, folder in (("numwords", "numwords-mixlora"), ("uppercase", "uppercase-dynmole"))
        for seen in json.loads((ADAPTERS / folder / "before_after.json").read_text())
    }
    assert dict(zip(expected, answers(client, list(expected)), strict=True)) == expected


def test_uppercase_answers_in_upper_case_and_the_base_does_not(client: OpenAI) -> None:
    questions = ("What is the opposite of tall?", "Describe the sun in one sentence.")
    asked = [(model, question) for question in questions for model in ("uppercase", "base")]
    result = answers(client, asked)
    for shouted, plain in zip(result[::2], result[1::2], strict=True):
        assert shouted == shouted.upper() != shouted.lower()
        assert plain != plain.upper()


def prompts_of(case: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads((ORACLES / case / "oracle.json").read_text())[
        "prompts"
    ]
    return result


@pytest.fixture(scope="module")
def completions(client: OpenAI) -> dict[tuple[str, int], Completion]:
    """By case and number of the prompt: all of them asked at once."""

    def ask(key: tuple[str, int]) -> Completion:
        case, number = key
        return client.completions.create(
            model=case,
            prompt=prompts_of(case)[number]["prompt_token_ids"],
            max_tokens=16,
            temperature=0,
            logprobs=20,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )

    keys = [(case, number) for case in CASES for number in range(len(prompts_of(case)))]
    with ThreadPoolExecutor(len(keys)) as pool:
        return dict(zip(keys, pool.map(ask, keys), strict=True))


@needs_oracles
@pytest.mark.parametrize("case", CASES)
def test_golden_case(completions: dict[tuple[str, int], Completion], case: str) -> None:
    """Greedy tokens whose margin decides them, and the log-probabilities after each prompt."""
    tensors = load_file(ORACLES / case / "oracle.safetensors")
    for i, prompt in enumerate(prompts_of(case)):
        logprobs = completions[case, i].choices[0].logprobs
        assert logprobs is not None
        assert_greedy([_token(text) for text in logprobs.tokens or []], prompt)
        result = {_token(text): value for text, value in (logprobs.top_logprobs or [])[0].items()}
        expected = tensors[f"prompt{i}.logits_last"].log_softmax(-1)
        best = expected.topk(10).indices
        difference = torch.tensor([result[int(token)] for token in best]) - expected[best]
        assert difference.abs().max() < TOLERANCE


def assert_greedy(tokens: list[int], prompt: dict[str, Any]) -> None:
    """Identical up to the first near-tie, after which continuations may differ."""
    expected = prompt["greedy_token_ids"]
    assert len(tokens) == len(expected)
    margins = zip(tokens, expected, prompt["greedy_logit_margins"], strict=True)
    for step, (token, wanted, margin) in enumerate(margins):
        if margin <= TOLERANCE:
            return
        assert token == wanted, f"step {step}: {tokens} is not {expected}"


def _token(text: str) -> int:
    return int(text.removeprefix("token_id:"))
