"""Trainers push a version after another into a server that answers meanwhile. TRL does it itself
here; of the others, which run inside engines of their own, there are the requests, in order.
docs/training.md says of which versions of them.
"""

import asyncio
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import requests
import torch
from support.api_client import GOLDEN, KEY, Api, Running, eventually, oracle
from support.uploads import files_of, safetensors_of, upload

VERSIONS = ("lora", "rslora", "mola", "mixlora", "dynmole-soft")
PROMPT = oracle("lora")["prompts"][1]["prompt_token_ids"]
MANY_TOKENS = 300


def answer(case: str) -> list[int]:
    """Of the golden case to PROMPT, by the method's own code."""
    prompt = oracle(case)["prompts"][1]
    assert prompt["prompt_token_ids"] == PROMPT
    tokens: list[int] = prompt["greedy_token_ids"]
    return tokens


class Stream:
    """Asks one model again and again, beside what a test does. answers: whole ones. model: may be
    changed."""

    def __init__(self, api: Api, model: str) -> None:
        self.model = model
        self.answers: list[tuple[str, list[int]]] = []
        self._api = api
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.is_set():
            model = self.model
            tokens = Running(self._api, model, PROMPT, 12).rest()
            self.answers.append((model, tokens))

    def stop(self) -> None:
        self._done.set()

    def more(self) -> None:
        """Waits for an answer that began after now."""
        seen = len(self.answers)
        assert eventually(lambda: len(self.answers) > seen + 1)


@contextmanager
def streams(api: Api, model: str, count: int = 2) -> Iterator[list[Stream]]:
    """Raises what any of them raises: a request that failed."""
    result = [Stream(api, model) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(stream.run) for stream in result]
        try:
            yield result
        finally:
            for stream in result:
                stream.stop()
    for one in running:
        one.result()


# TRL


@pytest.fixture(scope="module")
def trl() -> Any:
    """AsyncGRPO's trainer and rollout worker."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        module = pytest.importorskip(
            "trl.experimental.async_grpo.async_grpo_trainer",
            reason="the extra eval is not installed",
        )
        # It has no setting for a key. This is requests' own, of every request that it sends.
        ours = {**requests.sessions.default_headers(), "Authorization": f"Bearer {KEY}"}
        patched.setattr(requests.sessions, "default_headers", lambda: dict(ours))
        yield module


class Checkpoint(torch.nn.Module):
    """What TRL saves a version from: a mixture, of which its trainer wrote the files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def save_pretrained(self, target: str, **_: Any) -> None:
        shutil.copytree(self._folder, target, dirs_exist_ok=True)


class Rollouts:
    """Requests as TRL's rollout worker makes them, by the version that it was told of last."""

    def __init__(self) -> None:
        self.version = 0

    def update_model_version(self, version: int) -> None:
        self.version = version


def trainer_of(trl: Any, api: Api, model: Any, max_staleness: int) -> Any:
    """What `_sync_weight_lora` uses of a trainer; its client, accelerator and arguments are TRL's
    and accelerate's."""
    client = trl.VLLMClient(api.url)
    return SimpleNamespace(
        model=model,
        model_version=0,
        accelerator=trl.Accelerator(cpu=True),
        vllm_client=client,
        rollout_worker=Rollouts(),
        args=SimpleNamespace(max_staleness=max_staleness),
        _lora_dir=str(api.root / "trl"),
        _lora_name="trl-policy",
        _adapter_name="default",
    )


def sync(trl: Any, trainer: Any) -> str:
    """One weight sync, by TRL; the name of the new version."""
    trl.AsyncGRPOTrainer._sync_weight_lora(trainer, 0.0)
    assert trainer.rollout_worker.version == trainer.model_version
    return f"{trainer._lora_name}-v{trainer.model_version}"


def rollout(trl: Any, api: Api, version: int) -> list[int]:
    """One turn of TRL's rollout worker, greedy."""
    loop = object.__new__(trl.AsyncRolloutWorker._loop_cls)
    vars(loop).update(
        lora_name="trl-policy",
        vllm_server_url=api.url,
        _model_version_value=SimpleNamespace(value=version),
        _counters=Counter(),
        max_tokens=12,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        request_timeout=60,
    )

    async def ask() -> tuple[list[int], list[float]]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with aiohttp.ClientSession(headers=headers) as loop.session:
            turn: tuple[list[int], list[float]] = await loop._generate_one_turn(PROMPT)
            return turn

    tokens, logprobs = asyncio.run(ask())
    assert len(tokens) == len(logprobs)
    return tokens


def test_trl_pushes_versions_of_a_lora_that_it_trains(clean: Api, trl: Any) -> None:
    """Each answers as the model that it was saved from, in Transformers and PEFT."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny-llama", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    trainer = trainer_of(trl, clean, model, max_staleness=1)
    trainer.vllm_client.wait_for_server_ready()
    assert trainer.vllm_client.get_max_model_len() == 2048
    assert trainer.vllm_client.get_dtype() == "torch.float32"
    assert trainer.vllm_client.get_world_size() == 1
    info = trainer.vllm_client.get_server_info()
    assert trl.select_adapter_sync(info, model, trainer.args) is True
    ids = torch.tensor([PROMPT])
    expected: dict[str, list[int]] = {}
    for _ in range(3):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(torch.randn_like(weight) * 0.5)
            made = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        version = sync(trl, trainer)
        expected[version] = made[0, len(PROMPT) :].tolist()
        # It may end at an end-of-text token.
        rolled = rollout(trl, clean, trainer.model_version)
        assert rolled
        assert rolled == expected[version][: len(rolled)]
        for name in list(expected)[-2:]:
            assert clean.greedy(name, PROMPT) == expected[name], name
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    assert {name for name in clean.models() if name in expected} == set(list(expected)[-2:])


def test_trl_pushes_mixtures_under_streams(clean: Api, trl: Any) -> None:
    """max_staleness + 1 are alive; a request that runs on an older one ends on it."""
    trainer = trainer_of(trl, clean, None, max_staleness=1)
    cases: dict[str, str] = {}

    def push(case: str) -> str:
        trainer.model = Checkpoint(clean.root / case)
        version = sync(trl, trainer)
        cases[version] = case
        return version

    first = push(VERSIONS[0])
    quiet = clean.greedy(first, PROMPT, MANY_TOKENS)
    with ExitStack() as stack:
        old = Running(clean, first, PROMPT, MANY_TOKENS)
        (one, other) = stack.enter_context(streams(clean, first))
        for case in VERSIONS[1:]:
            one.model = push(case)
            one.more()
            other.model = one.model
            other.more()
            alive = [name for name in clean.models() if name in cases]
            assert alive == list(cases)[-2:]
        assert old.rest() == quiet
    for stream in (one, other):
        assert {name for name, _ in stream.answers} == set(cases)
        for name, tokens in stream.answers:
            assert tokens == answer(cases[name]), name


# SkyRL, verl, ms-swift


def pausing(api: Api, clear_cache: bool) -> None:
    params = {"mode": "keep", "clear_cache": str(clear_cache).lower()}
    assert api.http.post("/pause", params=params).status_code == 200


def resume(api: Api) -> None:
    assert api.http.post("/resume").status_code == 200


def test_skyrl_loads_the_same_name_from_disk_while_it_has_paused(clean: Api) -> None:
    """RemoteInferenceClient: pause with `keep`, load, resume; the prefix cache is not reset."""
    name = "skyrl-lora"
    for number, case in enumerate(VERSIONS):
        running = Running(clean, name, PROMPT, 100) if number else None
        pausing(clean, clear_cache=False)
        # Before it could load in place, it unloaded first; a name that is not there is a 404.
        if number % 2:
            assert clean.unload(name).status_code == 200
        loaded = clean.load(name, f"{clean.root}/{case}", load_inplace=True)
        assert loaded.status_code == 200, loaded.text
        resume(clean)
        assert clean.greedy(name, PROMPT) == answer(case), case
        if running is not None:
            assert running.rest()[:12] == answer(VERSIONS[number - 1])


def test_verl_and_ms_swift_replace_one_name_in_place(clean: Api, tmp_path: Path) -> None:
    """Both push tensors to workers of their own: one name and id, the old adapter removed, the new
    one added, the prefix cache taken for clean. Here the files are sent."""
    sent = [files_of(safetensors_of(case, tmp_path / case)) for case in VERSIONS]
    assert upload(clean, sent[0], {"name": "123"}).status_code == 200
    allowed = [answer(case) for case in VERSIONS]
    with streams(clean, "123") as result:
        for number, case in enumerate(VERSIONS):
            replaced = upload(clean, sent[number], {"name": "123"})
            assert replaced.json()["status"] == ("replaced" if number else "unchanged")
            for _ in range(2):
                # The second finds its prompt in the prefix cache, and it is this version's.
                assert clean.greedy("123", PROMPT) == answer(case), case
            for stream in result:
                stream.more()
    for stream in result:
        turns = [allowed.index(tokens) for _, tokens in stream.answers]
        assert turns == sorted(turns)
        assert set(turns) == set(range(len(VERSIONS)))
