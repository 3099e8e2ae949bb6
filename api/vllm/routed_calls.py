"""Calls of the engine whose routing was asked for: what to tell the workers, and what they answer.

Every worker keeps what its routers chose for such a request, by position
(`molehill.engine.vllm.routing_capture`). It is asked for as outputs come, of the tokens that the
engine has accepted by then; the last token of an answer has none, for it is never read.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from molehill.api.adapters.errors import RoutingBusyError
from molehill.api.adapters.generation import Generation
from molehill.api.vllm.invocation import is_beam, token_ids
from molehill.engine.transform.replayed_choices import ReplayedChoices
from molehill.engine.transform.routers import DecidingRouter
from molehill.engine.vllm import protocol
from molehill.engine.vllm.chosen_experts import NOBODY
from molehill.engine.vllm.protocol import Engine, RoutesReply, RoutingUsage, TokenRange
from molehill.engine.vllm.routing_capture import ASKED

Outputs = AsyncGenerator[Any, None]

# Bytes of an expert's id, and of its weight.
ENTRY = 2


@dataclass(frozen=True)
class RoutingAsked:
    """experts: chosen by each router for each token. weights: theirs too. usage: sums."""

    experts: bool = False
    weights: bool = False
    usage: bool = False


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens from `start` on. experts: int16 `[tokens, sites, k]`. weights: float16, the same, or
    None."""

    start: int
    experts: NDArray[np.int16]
    weights: NDArray[np.float16] | None


class RoutingMemory:
    """limit: bytes of all that is kept of the routing of running requests, on one worker. refusal:
    why none can be asked for, if so. splits_heads: whether each worker has other heads.
    most_tokens: of a request's prompt and answer, where it sets no max_tokens."""

    def __init__(
        self,
        limit: int,
        refusal: str | None = None,
        splits_heads: bool = False,
        most_tokens: int = 0,
    ) -> None:
        self.most_tokens = most_tokens
        self._limit = limit
        self._taken = 0
        self._refusal = refusal
        self._splits_heads = splits_heads

    def check(self) -> None:
        """Raises RuntimeError where no request can be told its routing."""
        if self._refusal is not None:
            raise RuntimeError(f"--enable-return-routed-experts: {self._refusal}")

    def reserve(self, size: int, routers: Sequence[DecidingRouter] = ()) -> Callable[[], None]:
        """Bytes, until what it returns is called. routers: whose decisions are kept. Raises
        VLLMValidationError, RoutingBusyError."""
        if self._refusal is not None:
            raise refused(self._refusal)
        if self._splits_heads and any(router.head is not None for router in routers):
            raise refused("found tensor parallelism and a mixture of vectors, expected either")
        if size > self._limit:
            raise refused(
                f"found {size} bytes for prompt and max_tokens, expected at most {self._limit} "
                "(--routing-bytes)"
            )
        if self._taken + size > self._limit:
            message = f"routing: found {self._taken} of {self._limit} bytes taken, expected {size}"
            raise RoutingBusyError(f"{message} free (--routing-bytes)")
        self._taken += size
        sizes = [size]

        def release() -> None:
            while sizes:
                self._taken -= sizes.pop()

        return release


def routing_memory(config: Any, limit: int, captures: bool) -> RoutingMemory:
    """config: vLLM's. captures: whether GPU workers have room for it in their graphs."""
    parallel, refusal = config.parallel_config, None
    if not current_platform.is_cpu() and not captures:
        refusal = "found a server on a GPU without --capture-routing, expected one with"
    elif config.scheduler_config.async_scheduling and config.speculative_config is not None:
        refusal = "found speculative decoding with asynchronous scheduling, expected either"
    most_tokens = config.model_config.max_model_len
    return RoutingMemory(limit, refusal, parallel.tensor_parallel_size > 1, most_tokens)


def refused(message: str) -> VLLMValidationError:
    """As vLLM's routes understand it."""
    return VLLMValidationError(f"routing: {message}", parameter="molehill")


def check_plain(arguments: Mapping[str, Any]) -> None:
    """Raises VLLMValidationError for sampling parameters that say what is said here only.

    arguments: of a call of the engine, by name.
    """
    parameters = arguments.get("sampling_params")
    if ASKED in (getattr(parameters, "extra_args", None) or {}):
        raise refused(f"found {ASKED} in extra_args, expected it in the body's molehill field")


def check_base(asked: RoutingAsked | None) -> None:
    """Raises VLLMValidationError if the base model is asked."""
    if asked is not None and asked.experts:
        raise refused("found the base model, which routes nothing, expected an adapter")


class RoutedCall:
    """One call of the engine, of one prompt."""

    def __init__(
        self,
        engines: Callable[[str], Engine],
        memory: RoutingMemory,
        asked: RoutingAsked,
        generation: Generation,
        arguments: Mapping[str, Any],
        choices: ReplayedChoices | None = None,
    ) -> None:
        """engines: those that will run the request of a key. arguments: of the call, by name.
        choices: how vLLM's `routed_experts` are laid out, if its outputs are to have them. Raises
        VLLMValidationError, RoutingBusyError."""
        self._asked, self._routers = asked, generation.content.routers
        self._choices = choices
        self._most = generation.content.most_experts
        self._key = uuid.uuid4().hex
        self._engine = engines(self._key)
        parameters = checked(generation, asked, arguments)
        self.samples: int = parameters.n
        prompt = token_ids(arguments["prompt"]) or ()
        # vLLM itself sets what was left open, later.
        most = parameters.max_tokens
        tokens = memory.most_tokens if most is None else len(prompt) + most
        entries = self.samples * tokens * len(self._routers) * self._most
        size = entries * ENTRY * (2 if asked.weights else 1)
        self._release = memory.reserve(size, self._routers)
        self._deltas = parameters.output_kind is RequestOutputKind.DELTA
        self._prompt = len(prompt)
        self._generated = [0] * self.samples
        self._taken = [0] * self.samples
        self._parts: list[list[RoutedTokens]] = [[] for _ in range(self.samples)]
        self._replayed: list[list[NDArray[np.int16]]] = [[] for _ in range(self.samples)]
        self._replayed_from: int = parameters.routed_experts_prompt_start
        self._ended = False
        self.usage: RoutingUsage | None = None
        parameters = parameters.clone()
        # Tokens that are not computed are not routed.
        parameters.skip_reading_prefix_cache = True
        parameters.extra_args = {
            **(parameters.extra_args or {}),
            ASKED: {
                "key": self._key,
                "tokens": tokens,
                "weights": asked.weights,
                "n": self.samples,
            },
        }
        self.arguments = {**arguments, "sampling_params": parameters}

    async def follow(self, outputs: Outputs) -> Outputs:
        """The same outputs, each once its tokens' routing is here."""
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    await self._take(output)
                    self._fill_in(output)
                    yield output
        finally:
            self.end()

    def end(self) -> None:
        """Nothing more is asked for; what the workers keep goes."""
        self._release()
        if not self._ended:
            self._ended = True
            forget = protocol.FORGET_ROUTES.ask(
                self._engine, protocol.ForgetRoutesRequest(self._key)
            )
            _running.add(task := asyncio.ensure_future(forget))
            task.add_done_callback(_forgotten)

    def take(self, sample: int) -> RoutedTokens | None:
        """What came since the last time; None if nothing did."""
        parts, self._parts[sample] = self._parts[sample], []
        if not parts:
            return None
        weights = [part.weights for part in parts if part.weights is not None]
        experts = np.concatenate([part.experts for part in parts])
        return RoutedTokens(parts[0].start, experts, np.concatenate(weights) if weights else None)

    async def _take(self, output: Any) -> None:
        ranges = self._new_ranges(output)
        usage = self._asked.usage and output.finished
        if usage:
            known = {part.index for part in ranges}
            others = [i for i in range(self.samples) if i not in known]
            ranges += [TokenRange(i, self._taken[i], self._taken[i]) for i in others]
        if not ranges and not output.finished:
            return
        asked = protocol.RoutesRequest(self._key, tuple(ranges), usage, forget=output.finished)
        self._ended = output.finished
        replies = of_stages(await protocol.ROUTES.ask(self._engine, asked))
        if usage:
            self.usage = usage_of(replies)
        for part in ranges:
            self._taken[part.index] = part.stop
            if part.stop > part.start:
                self._keep(part.index, self._assembled(replies, part))

    def _keep(self, sample: int, routed: RoutedTokens) -> None:
        if self._asked.experts:
            self._parts[sample].append(routed)
        if self._choices is not None:
            self._replayed[sample].append(routed.experts)

    def _fill_in(self, output: Any) -> None:
        """vLLM's `routed_experts`, which a sample has once it has ended."""
        for sample in output.outputs:
            parts = self._replayed[sample.index]
            if self._choices is not None and sample.finish_reason is not None and parts:
                experts = np.concatenate(parts)[self._replayed_from :]
                sample.routed_experts = self._choices.array(experts)
                parts.clear()

    def _new_ranges(self, output: Any) -> list[TokenRange]:
        """Of tokens that were read since the last output."""
        ranges = []
        for sample in output.outputs:
            i, count = sample.index, len(sample.token_ids)
            self._generated[i] = self._generated[i] + count if self._deltas else count
            stop = self._prompt + max(0, self._generated[i] - 1)
            if stop > self._taken[i] and self._generated[i]:
                ranges.append(TokenRange(i, self._taken[i], stop))
        return ranges

    def _assembled(self, replies: Sequence[RoutesReply], part: TokenRange) -> RoutedTokens:
        """The routers of all stages, in the adapter's order."""
        shape = part.stop - part.start, len(self._routers), self._most
        experts = np.full(shape, NOBODY, dtype=np.int16)
        weights = np.zeros(shape, dtype=np.float16) if self._asked.weights else None
        places = {(router.site, router.head or 0): i for i, router in enumerate(self._routers)}
        for reply in replies:
            columns = [i for i, router in enumerate(reply.routers) if router in places]
            targets = [places[reply.routers[i]] for i in columns]
            for routes in reply.parts:
                if routes.index != part.index or not columns:
                    continue
                most = min(reply.most, self._most)
                found = array(routes.experts, np.int16, reply)[:, columns, :most]
                experts[: len(found), targets, :most] = found
                if weights is not None:
                    found_weights = array(routes.weights, np.float16, reply)[:, columns, :most]
                    weights[: len(found), targets, :most] = found_weights
        return RoutedTokens(part.start, experts, weights)


def checked(generation: Generation, asked: RoutingAsked, arguments: Mapping[str, Any]) -> Any:
    """The call's sampling parameters. Raises VLLMValidationError."""
    parameters = arguments.get("sampling_params")
    if parameters is None:
        raise refused("found a request without generated tokens, expected one with")
    if is_beam(arguments):
        raise refused("found beam search, expected none")
    if token_ids(arguments["prompt"]) is None:
        raise refused("found a prompt without token ids, expected one with")
    if asked.experts and not generation.content.routers:
        raise refused(
            f"found {generation.name!a}, in which no router decides anything, expected a mixture"
        )
    return parameters


def of_stages(replies: Sequence[RoutesReply]) -> list[RoutesReply]:
    """One worker's of each pipeline stage: tensor-parallel ranks route alike. Of several engines,
    each knows of the samples that it has."""
    first: dict[tuple[int, frozenset[int]], RoutesReply] = {}
    for reply in replies:
        if reply.parts:
            first.setdefault((reply.stage, samples_in(reply)), reply)
    return list(first.values())


def samples_in(reply: RoutesReply) -> frozenset[int]:
    return frozenset(part.index for part in reply.parts)


def usage_of(replies: Sequence[RoutesReply]) -> RoutingUsage:
    """Of all stages, each of which reads the same tokens of its samples."""
    usage = sum((reply.usage for reply in replies), RoutingUsage())
    tokens: dict[frozenset[int], int] = {}
    for reply in replies:
        samples = samples_in(reply)
        tokens[samples] = max(tokens.get(samples, 0), reply.usage.tokens)
    return replace(usage, tokens=sum(tokens.values()))


def array(data: bytes, dtype: Any, reply: RoutesReply) -> NDArray[Any]:
    return np.frombuffer(data, dtype).reshape(-1, len(reply.routers), reply.most)


# Kept until they are done: nobody else has them.
_running: set[asyncio.Future[Any]] = set()


def _forgotten(task: asyncio.Future[Any]) -> None:
    _running.discard(task)
    if not task.cancelled():
        # An engine that is gone keeps nothing.
        task.exception()
