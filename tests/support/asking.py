"""Asks an engine for golden prompts and compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molehill.engine.vllm.protocol import ReplyT, RequestT, Rpc, to_wire
from support.golden import SERVED, Case, Prompt, greatest_difference, served_path

LOGIT_TOLERANCE = 1e-3
IDS = {name: i + 1 for i, name in enumerate(SERVED)}


def ask_worker(llm: Any, rpc: Rpc[RequestT, ReplyT], request: RequestT) -> ReplyT:
    """As the API side asks, of an engine's only worker."""
    (reply,) = rpc.replies(llm.collective_rpc(rpc.method, args=(to_wire(request),)))
    return reply


@dataclass(frozen=True)
class Reply:
    """tokens: greedy ones. logits: after the prompt, `[vocabulary]`. prompt_logits: by position
    from the second, `[tokens - 1, vocabulary]`, if they were asked for. cached: prompt tokens that
    came from the prefix cache. by_step: vLLM's log-probabilities of every token of the answer."""

    tokens: tuple[int, ...]
    logits: Tensor
    prompt_logits: Tensor | None
    cached: int
    by_step: Any

    def logits_at(self, step: int) -> Tensor:
        """Of which the answer's token number `step`, from 0 on, was chosen: `[vocabulary]`."""
        return _row(self.by_step[step])


def request(case: str, others: Mapping[str, Path] | None = None) -> Any:
    """The LoRARequest of a golden case, or of one of `others`; None is the base."""
    from vllm.lora.request import LoRARequest

    if others is not None and case in others:
        return LoRARequest(case, 100 + list(others).index(case), str(others[case]))
    return None if case == "base" else LoRARequest(case, IDS[case], str(served_path(case)))


def ask(
    llm: Any,
    prompts: Sequence[Prompt],
    tokens: int = 12,
    prompt_logits: bool = False,
    others: Mapping[str, Path] | None = None,
) -> list[Reply]:
    """All prompts in one batch, each with the adapter of its case; others: paths by case."""
    ids = [list(prompt.ids) for prompt in prompts]
    requests = [request(prompt.case, others) for prompt in prompts]
    return ask_each(llm, ids, requests, tokens, prompt_logits)


def ask_each(
    llm: Any,
    prompts: Sequence[list[int] | dict[str, Any]],
    requests: Sequence[Any],
    tokens: int = 12,
    prompt_logits: bool = False,
    extra: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[Reply]:
    """All prompts in one batch, each with its LoRARequest or None. prompts: ids, or what else vLLM
    takes. extra: further sampling parameters, by a prompt's number."""
    from vllm import SamplingParams

    # The text of every token of the vocabulary, at every step, would take most of the time.
    sampling = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=-1,
        prompt_logprobs=-1 if prompt_logits else None,
        detokenize=False,
        flat_logprobs=True,
    )
    every = [sampling.clone() for _ in prompts]
    for number, parameters in (extra or {}).items():
        for name, value in parameters.items():
            setattr(every[number], name, value)
    outputs = llm.generate(
        [
            prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt}
            for prompt in prompts
        ],
        every,
        lora_request=list(requests),
        use_tqdm=False,
    )
    return [_reply(output) for output in outputs]


def _reply(output: Any) -> Reply:
    rows = [_row(position) for position in (output.prompt_logprobs or [])[1:]]
    return Reply(
        tuple(output.outputs[0].token_ids),
        _row(output.outputs[0].logprobs[0]),
        torch.stack(rows) if rows else None,
        output.num_cached_tokens or 0,
        output.outputs[0].logprobs,
    )


def _row(by_token: Any) -> Tensor:
    return torch.tensor([by_token[token].logprob for token in range(len(by_token))])


def assert_golden(replies: Sequence[Reply], prompts: Sequence[Prompt]) -> None:
    """Greedy tokens are identical, logits after the prompt within tolerance."""
    wrong = [
        f"{prompt.case}: {reply.tokens} is not {prompt.greedy}, "
        f"logits differ by {greatest_difference(reply.logits, prompt.logits):.2g}"
        for reply, prompt in zip(replies, prompts, strict=True)
        if reply.tokens != prompt.greedy
        or greatest_difference(reply.logits, prompt.logits) > LOGIT_TOLERANCE
    ]
    assert not wrong, "\n".join(wrong)


def every_prompt() -> list[Prompt]:
    """Base and every served method, interleaved so that neighbours in the batch differ."""
    cases = [Case(name).prompts for name in ("base", *SERVED)]
    return [prompts[i] for i in range(4) for prompts in cases]
