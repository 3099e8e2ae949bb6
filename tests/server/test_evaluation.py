"""What researchers measure with: lm-eval, `vllm bench serve` and GuideLLM, a mixture's name as the
model."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.api_client import BASE, GOLDEN, KEY, Api
from support.evaluation import (
    CHOICE,
    INSTALLED,
    REPOSITORY,
    WRITE,
    Scored,
    evaluate,
    needs_lm_eval,
    of_server,
    on_transformers,
)
from support.proxies import found, needs

# The adapter that the shared server starts with, and the base model.
ADAPTERS = {"started": GOLDEN / "cases" / "dynmole-default", BASE: None}
TOLERANCE = 1e-3
LOADED = ("started", "loaded")


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tasks' paths are from the repository's root; what lm-eval keeps goes with the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setenv("OPENAI_API_KEY", KEY)
        if INSTALLED:
            cache = tmp_path_factory.mktemp("datasets")
            patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Scored]:
    """By model: the choices as the adapter on Transformers makes them."""
    scored = {}
    for name, adapter in ADAPTERS.items():
        with on_transformers(model, adapter) as lm:
            scored[name] = evaluate(lm, CHOICE)
    assert not torch.allclose(*(each.likelihoods for each in scored.values()), atol=TOLERANCE)
    return scored


@needs_lm_eval
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    ("batch_size", "asking"),
    [
        (42, {"tokenized_requests": True}),
        (4, {"tokenized_requests": False, "num_concurrent": 4}),
    ],
    ids=["token-ids-in-long-lists", "text-at-once"],
)
def test_choices_are_those_of_transformers(
    api: Api,
    model: Path,
    expected: dict[str, Scored],
    name: str,
    batch_size: int,
    asking: dict[str, int],
) -> None:
    arguments = of_server(api.url, name, model, "completions", **asking)
    scored = evaluate("local-completions", CHOICE, arguments, batch_size=batch_size)
    torch.testing.assert_close(
        scored.likelihoods, expected[name].likelihoods, atol=TOLERANCE, rtol=0
    )
    assert scored.chosen == expected[name].chosen
    assert scored.greedy == expected[name].greedy
    assert scored.score == expected[name].score


@needs_lm_eval
def test_chat_answers_are_those_of_transformers(api: Api, model: Path) -> None:
    more = {"apply_chat_template": True, "gen_kwargs": {"max_gen_toks": 6}, "limit": 8}
    arguments = of_server(api.url, "started", model, "chat/completions", num_concurrent=8)
    scored = evaluate("local-chat-completions", WRITE, arguments, **more)
    with on_transformers(model, ADAPTERS["started"], batch_size=1) as lm:
        expected = evaluate(lm, WRITE, **more)
    # A character whose last bytes are yet to come: Transformers shows a mark for it, vLLM nothing.
    assert scored.answers == [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in expected.answers]
    assert all(scored.answers)


def tokens_read(api: Api, name: str) -> int:
    tokens: int = api.http.get(f"/v1/adapters/{name}/routing").json()["tokens"]
    return tokens


def test_vllm_bench_serve_asks_adapters(clean: Api, model: Path) -> None:
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert clean.load("loaded", "mixlora").status_code == 200
    before = {name: tokens_read(clean, name) for name in LOADED}
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    result = main(
        parser.parse_args(
            [
                *("--base-url", clean.url, "--model", BASE, "--tokenizer", str(model)),
                *("--dataset-name", "random", "--random-input-len", "16"),
                *("--random-output-len", "4", "--num-prompts", "8", "--num-warmups", "0"),
                *("--lora-modules", *LOADED, "--lora-assignment", "round-robin"),
            ]
        )
    )
    assert (result["completed"], result["failed"]) == (8, 0)
    for name in LOADED:
        assert tokens_read(clean, name) >= before[name] + 4 * (16 + 3)


@needs("guidellm")
def test_guidellm_asks_an_adapter(api: Api, model: Path, tmp_path: Path) -> None:
    before = tokens_read(api, "started")
    report = tmp_path / "report.json"
    target = f"kind=openai_http,target={api.url},model=started,api_key={KEY}"
    program = found("guidellm")
    assert program is not None
    options = {
        "backend": f"{target},request_format=/v1/completions",
        "tokenizer": f"kind=hf_auto,model={model}",
        "data": "kind=synthetic_text,prompt_tokens=16,output_tokens=4",
        "profile": "kind=synchronous",
        "constraint": "kind=max_requests,count=3",
        "output": f"kind=json,path={report}",
    }
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [program, "run", *given, "--disable-console"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    answered = benchmark["metrics"]["request_totals"]
    assert (answered["successful"], answered["errored"]) == (3, 0)
    assert tokens_read(api, "started") >= before + 3 * (16 + 3)
