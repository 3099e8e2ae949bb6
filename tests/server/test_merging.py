"""Merging on a real server: static adapters as they load, and one adapter in the base weights."""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.api_client import BASE, GOLDEN, KEY, Api, copy_adapter, edit_tensors, oracle
from support.server import TINY, serve
from transformers import AutoModelForCausalLM

from molehill.api.vllm import launcher, options
from molehill.api.vllm.launcher import LaunchError
from molehill.engine import formats
from molehill.engine.adapter.errors import BaseMismatchError, UnsupportedError
from molehill.engine.hf.reference import attach

TINY_LLAMA = GOLDEN / "tiny-llama"
LORA, MOLA = GOLDEN / "cases" / "lora", GOLDEN / "cases" / "mola"


@contextmanager
def merged_server(folder: Path, options: Sequence[str]) -> Iterator[Api]:
    """A server with the golden LoRA in its weights."""
    root = folder / "adapters"
    for case in ("lora", "rslora", "mola", "mixlora"):
        copy_adapter(case, root / case)
    arguments = [
        *options,
        *("--served-model-name", BASE, "--api-key", KEY),
        *("--adapter-root", str(root), "--adapter-store", str(folder / "store")),
        *("--adapter", f"resident={LORA}", "--merge-into-base", "resident"),
    ]
    with serve(TINY_LLAMA, folder / "log", arguments, warm=True) as server:
        yield Api(server.url, root, folder / "store")
        assert server.process.poll() is None, server.tail()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with merged_server(tmp_path_factory.mktemp("merged"), TINY) as api:
        yield api


def assert_oracle(api: Api, model: str, case: str) -> None:
    for prompt in oracle(case)["prompts"]:
        assert api.greedy(model, prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


@pytest.mark.skipif(
    os.environ.get("MOLEHILL_LONG_TESTS") != "1",
    reason="compiles for a minute of processor time; MOLEHILL_LONG_TESTS=1 runs it",
)
def test_a_compiled_base_is_told_of_in_the_log_and_gives_the_oracles(tmp_path: Path) -> None:
    """Compiled as servers are by default."""
    options = [option for option in TINY if option != "--enforce-eager"]
    with merged_server(tmp_path, options) as api:
        assert_merged(api)
        text = (tmp_path / "log").read_text(errors="replace")
    assert "molehill: compiling the base model: one to five minutes on a CPU" in text
    end = (
        r"molehill: base model (compiled in \d+ s|read from the cache of compiled models in \d+ s)"
    )
    assert re.search(end, text)
    assert "No available shared memory broadcast block" not in text


def test_the_resident_the_base_and_another_adapter_give_their_oracles(merged: Api) -> None:
    assert_merged(merged)


def assert_merged(api: Api) -> None:
    assert api.load("m", "mixlora").status_code == 200
    for model, case in (("resident", "lora"), (BASE, "base"), ("m", "mixlora")):
        assert_oracle(api, model, case)
    assert api.metrics()['molehill_adapter_resident_bytes{adapter="resident",tier="worker"}'] == 0
    assert api.of_adapter("resident", "adapter_tokens_total") > 4 * 11
    assert api.unload("m").status_code == 200


def test_the_resident_is_neither_replaced_nor_unloaded(merged: Api) -> None:
    again = merged.load("resident", "lora").json()
    assert again["status"] == "unchanged"
    assert again["digest"] == formats.read(LORA).digest
    for response in (
        merged.load("resident", "rslora"),
        merged.load("resident", "rslora", load_inplace=True),
        merged.unload("resident"),
    ):
        status, kind, message = merged.error(response)
        assert (status, kind) == (409, "merged_into_base")
        assert "merged into the base weights" in message
    assert_oracle(merged, "resident", "lora")
    assert_oracle(merged, BASE, "base")


def test_a_static_mixture_is_served_as_one_pair(merged: Api) -> None:
    """Routers of zeros: the same answers, no routing, under the digest of what was loaded."""
    folder = copy_adapter("mola", merged.root / "zeroed")
    edit_tensors(folder, zero_routers)
    adapter = formats.read(folder)
    loaded = merged.load("zeroed", "zeroed").json()
    assert loaded["digest"] == adapter.digest
    (copy,) = [path.name for path in merged.store.iterdir() if path.name.startswith(adapter.digest)]
    assert copy == adapter.digest
    prompt = oracle("mola")["prompts"][2]["prompt_token_ids"]
    assert merged.greedy("zeroed", prompt) == reference(folder, prompt)
    assert merged.of_adapter("zeroed", "adapter_tokens_total") > 0
    assert merged.of_adapter("zeroed", "router_decisions_total") == 0
    assert merged.load("zeroed", "zeroed").json()["status"] == "unchanged"
    assert merged.unload("zeroed").status_code == 200
    assert not list(merged.store.glob(f"{adapter.digest}*"))


def zero_routers(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "moe_gate" in name:
            tensors[name] = torch.zeros_like(tensors[name])


@torch.no_grad()
def reference(folder: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    tokens = list(prompt)
    with attach(model, formats.read(folder)):
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-12:]


def prepared(
    *arguments: str, ours: options.Options, model: Path = TINY_LLAMA
) -> argparse.Namespace:
    return launcher.prepare(launcher.parse([str(model), *arguments]), ours)


def asking(name: str, path: Path = LORA) -> options.Options:
    return options.Options(adapters=(("resident", path),), merge_into_base=name)


def test_what_is_merged_reaches_the_workers(tmp_path: Path) -> None:
    args = prepared(ours=asking("resident"))
    resident = args.molehill.merged_base
    assert (resident.name, resident.digest) == ("resident", formats.read(LORA).digest)
    assert args.additional_config["molehill"]["merged_base"] == str(resident.directory)
    assert formats.read(resident.directory).sites.keys() == formats.read(LORA).sites.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantization", "fp8"], "found a quantised base model"),
        (["--load-format", "dummy"], "found --load-format dummy, expected one of auto"),
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
            "found speculative decoding",
        ),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_refused_at_start(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        prepared(*arguments, ours=asking("resident"))


def test_an_adapter_that_cannot_be_merged_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"expected a start adapter \(resident\)"):
        prepared(ours=asking("other"))
    with pytest.raises(UnsupportedError, match="resident: found no static site"):
        prepared(ours=asking("resident", MOLA))
    with pytest.raises(UnsupportedError, match="resident: found an activated adapter"):
        prepared(ours=asking("resident", GOLDEN / "cases" / "alora"))
    with pytest.raises(BaseMismatchError, match="tiny-moe"):
        prepared(ours=asking("resident"), model=GOLDEN / "tiny-moe")
